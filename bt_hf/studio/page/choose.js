// The view in which a person chooses.
import { html } from "./html.js";
import { choose, clicksSoFar, nextGroup, setWay, undo } from "./choosing.js";
import { Group } from "./groups.js";
import { imageUrl } from "./pictures.js";
import { KeyButton, Prompt, Stage } from "./stage.js";
import { state } from "./store.js";
import { Aside } from "./taste.js";
import { Uploads } from "./uploads.js";

const WAYS = { pair: "Pairs", stars: "Stars", best: "Best of four", rank: "Rank" };

const Ways = () => state.ways.length > 1 && html`
  <div class="ways" role="group" aria-label="Way to choose">
    ${state.ways.filter((way) => WAYS[way]).map((way) => html`
      <button type="button" key=${way} aria-pressed=${String(way === state.way)} onClick=${() => setWay(way)}>${WAYS[way]}</button>`)}
  </div>`;

/** Other answers, and other ways to choose. */
const Foot = ({ children }) => html`
  <div class="foot">
    <div class="controls" role="group" aria-label="Other answers">${children}
      <${KeyButton} label="Undo" keyName="⌫" shortcut="Backspace" onClick=${undo} disabled=${!clicksSoFar()} /></div>
    <${Ways} />
  </div>`;

function Pair() {
  const pair = state.pairs[0];
  if (!pair && state.unsent) return html`<p class="empty" role="status">The next pair comes as soon as your clicks are saved.</p><${Foot} />`;
  if (!pair) return html`<${NothingLeft} />${state.images >= 2 && html`<${Foot} />`}`;
  return html`
    <${Prompt} text=${pair.prompt} />
    <${Stage} turn=${pair.id} prompt=${pair.prompt} left=${imageUrl(pair.left)} right=${imageUrl(pair.right)} onChoose=${choose} />
    <${Foot}>
      <${KeyButton} label="Tie" keyName="↓" shortcut="ArrowDown" onClick=${() => choose("tie")} />
      <${KeyButton} label="Skip" keyName="↑" shortcut="ArrowUp" onClick=${() => choose("skip")} />
    <//>`;
}

const NothingLeft = () => html`
  <div class="empty">
    <h1>${state.images < 2 ? "There are too few pictures yet" : "No pair is left"}</h1>
    <p>${state.note || (state.images < 2
      ? "Two pictures at least are needed, with the same caption. Open the studio on a folder that has more."
      : "You have compared what there is to compare. See what was learnt.")}</p>
    ${state.images >= 2 && html`<p><a class="button" href="#taste">See your taste</a></p>`}
  </div>`;

function Others() {
  if (state.groupError) {
    return html`<div class="empty" role="alert"><p>${state.groupError}</p>
      <p><button type="button" class="button" onClick=${nextGroup}>Try again</button></p></div><${Foot} />`;
  }
  if (!state.group) return html`<p class="empty" role="status">${state.trouble ? "The next pictures come as soon as this is saved." : "…"}</p><${Foot} />`;
  const foot = (save) => html`<${Foot}>${save}<button type="button" class="control" onClick=${nextGroup}>Skip</button><//>`;
  return html`<${Group} key=${state.group.id} group=${state.group} foot=${foot} />`;
}

const Skipped = () => state.skipped.length > 0 && html`
  <details class="skipped">
    <summary>${state.skippedCount === 1 ? "1 file was left out" : `${state.skippedCount} files were left out`}</summary>
    <ul>${state.skipped.map(({ file, reason }) => html`<li><b>${file}</b> ${reason}</li>`)}</ul>
  </details>`;

export const Choose = () => html`
  <div class="choose">
    <section class="choose-main" aria-label="Choose">
      ${state.way === "pair" ? html`<${Pair} />` : html`<${Others} />`}
      ${state.can.upload?.ok && html`<${Uploads} open=${state.images < 2} />`}
      <${Skipped} />
    </section>
    ${(state.pairs.length > 0 || clicksSoFar() > 0) && html`<${Aside} />`}
  </div>`;

/** What a key does in this view, or nothing. */
export const keys = {
  ArrowLeft: () => state.way === "pair" && pressed(0),
  ArrowRight: () => state.way === "pair" && pressed(1),
  ArrowDown: () => state.way === "pair" && choose("tie"),
  ArrowUp: () => state.way === "pair" && choose("skip"),
  Backspace: undo,
};

// A key presses the button, so that what is disabled stays so and the choice is seen.
function pressed(side) {
  const button = document.querySelectorAll(".stage .choice")[side];
  if (button) button.click();
  return true;
}
