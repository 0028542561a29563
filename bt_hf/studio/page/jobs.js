// Work that runs on the server in the background: start, progress, stop, end.
import { ApiError, get, post } from "./api.js";
import { announce, html, sentence } from "./html.js";
import { state, update } from "./store.js";

const POLL = 700; // milliseconds between two looks at a running job
let timer = 0;

/** Start a job, and follow it to its end. */
export async function start(kind, options = {}) {
  try {
    update({ job: await post("api/jobs", { kind, ...options }), stopping: false, problem: "" });
    follow();
  } catch (error) {
    update({ problem: error.message });
  }
}

async function stop() {
  update({ stopping: true });
  try {
    await post("api/jobs/stop");
    follow();
  } catch (error) {
    update({ problem: error.message });
  }
}

/** See anew what can be trained and published: it changes with the clicks. */
export async function look() {
  try {
    const { can, drawing, job } = await get("api/state");
    update({ can, drawing, job });
    if (running()) follow();
  } catch (error) {
    update({ problem: error.message });
  }
}

/** Look at the job until it has ended; the page goes on meanwhile. */
export async function follow() {
  clearTimeout(timer);
  const before = state.job;
  try {
    const job = await get("api/jobs/current");
    update({ job });
    if (job && job.state === "running") {
      timer = setTimeout(follow, POLL);
    } else if (job && before && before.state === "running") {
      announce(sentence(job.message)); // on whatever part of the page the person is
      update({ ab: null });
      await look();
    }
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 0) timer = setTimeout(follow, 5 * POLL);
    else if (error.status !== 404) update({ problem: error.message });
  }
}

const running = () => state.job && state.job.state === "running";

/** Progress of a job, or how it ended. */
export function Job({ kind }) {
  const { job } = state;
  if (!job || job.kind !== kind) return null;
  if (job.state !== "running") return html`<p class="job job-${job.state}">${sentence(job.message)}</p>`;
  return html`<div class="job">
    <progress aria-label="Progress" max="1" value=${job.progress}></progress>
    <p>${job.message}</p>
    <button type="button" class="control" disabled=${state.stopping} onClick=${stop}>${state.stopping ? "Stopping …" : "Stop"}</button></div>`;
}

/** Button that starts a job, or the reason why it cannot. */
export const Starter = ({ kind, able, label }) => html`
  <p class="action"><button type="button" class="button" disabled=${!able.ok || running()} onClick=${() => start(kind)}>${label}</button>
    ${!able.ok && html` <span class="hint">${sentence(able.why)}</span>`}</p>
  <${Job} kind=${kind} />`;
