// The logic of choosing: which pair is shown, what a choice does, what an undo brings back.
import { get } from "./api.js";
import { announce, count, uuid } from "./html.js";
import * as outbox from "./outbox.js";
import { imageUrl, load } from "./pictures.js";
import { state, update } from "./store.js";

const LONGEST = 600; // seconds that one choice may be said to have taken: who went away did not think longer
const BLINK = 150; // milliseconds: nobody has seen a pair sooner, so this is the second half of a double click
const LOOK = 3000; // milliseconds between two looks for new pictures
const REMEMBERED = 50; // choices that can be undone without asking the server for the pair
const past = []; // {id, pair, group}
let looking = 0;
let shownAt = performance.now();
let asked = 0; // groups asked for; only the last one is shown

const said = { left: "Left chosen", right: "Right chosen", tie: "Tie", skip: "Skipped" };

/** Take over the state that the server gives on opening, and again after sleep. */
export async function refresh() {
  const { queue, skipped_count: skippedCount, ...values } = await get("api/state");
  const opened = !state.ready || values.session !== state.session;
  update({ ...values, skippedCount: skippedCount ?? values.skipped.length, problem: "", ready: true, pairs: opened ? [] : state.pairs });
  if (opened) outbox.open(replied, refused);
  arrange(queue);
  if (state.taste && state.taste.clicks < state.clicks) catchUp();
  if (state.way !== "pair" && !state.group) nextGroup();
}

/** Keep the pair on the page, put the server's next ones behind it, and load their pictures. */
function arrange(queue, replace = false) {
  const unsent = outbox.answered();
  const fresh = queue.filter((pair) => !unsent.has(pair.id));
  const shown = replace ? null : state.pairs[0];
  const pairs = shown ? [shown, ...fresh.filter((pair) => pair.id !== shown.id)] : fresh;
  if (!shown) shownAt = performance.now();
  for (const pair of pairs.slice(0, 3)) {
    load(imageUrl(pair.left));
    load(imageUrl(pair.right));
  }
  update({ pairs });
  clearTimeout(looking);
  if (!pairs.length && !state.unsent) looking = setTimeout(lookAgain, LOOK);
}

/** Pictures may be drawn or added while nothing is left to compare. */
function lookAgain() {
  if (!document.hidden) refresh().catch((error) => update({ problem: error.message }));
}

function replied({ clicks, queue, taste }, { path, body }) {
  update({ clicks, taste });
  if (taste && taste.clicks < clicks) catchUp();
  arrange(queue, path === "api/undo" && !body.click);
  if (state.way !== "pair" && !state.group) nextGroup();
}

let catchingUp = false;

/** The taste is refitted behind the click, so the reply may still have the one before: wait for the newer one. */
async function catchUp() {
  if (catchingUp) return;
  catchingUp = true;
  while (state.taste.clicks < state.clicks) { // each answer waits up to two seconds on the server
    const taste = await get(`api/taste?since=${state.clicks}`).catch(() => null);
    if (!taste) break;
    update({ taste });
  }
  catchingUp = false;
}

function refused() {
  refresh().catch((error) => update({ problem: error.message }));
}

function remember(entry) {
  past.push(entry);
  if (past.length > REMEMBERED) past.shift();
}

const seconds = () => Math.min(LONGEST, Math.max(0, (performance.now() - shownAt) / 1000));

/** Answer the shown pair, and show the next one at once. */
export function choose(choice) {
  const [pair, ...rest] = state.pairs;
  if (!pair || performance.now() - shownAt < BLINK) return;
  const id = uuid();
  outbox.put("api/clicks", { id, pair: pair.id, choice, seconds: seconds() });
  remember({ id, pair });
  shownAt = performance.now();
  update({ pairs: rest, lost: "" });
  const next = rest[0] ? `Next: ${rest[0].prompt}` : "";
  announce(`${said[choice]}. ${count(clicksSoFar(), "click")}. ${next}`);
}

/** Give stars, a best one or an order to the shown group. */
export function judge(judgement) {
  const { group, way } = state;
  if (!group) return;
  const id = uuid();
  remember({ id, group });
  update({ group: null, lost: "" });
  outbox.put("api/judgements", { id, group: group.id, way, ...judgement });
  announce("Saved. The next pictures come.");
}

/** Take back the last click, also one that an earlier page made. */
export function undo() {
  if (!clicksSoFar() && !past.length) return;
  const last = past.pop();
  outbox.put("api/undo", { id: uuid(), click: last ? last.id : null });
  if (last && last.pair) {
    shownAt = performance.now();
    update({ way: "pair", pairs: [last.pair, ...state.pairs.filter((pair) => pair.id !== last.pair.id)] });
  } else if (last) {
    asked += 1; // a group that is on its way comes too late
    update({ way: last.group.way || state.way, group: last.group });
  }
  announce("The last click is taken back.");
}

/** Clicks that count, the unsent ones included. */
export const clicksSoFar = () => Math.max(0, state.clicks + outbox.balance());

/** Pairs, stars, best of four, or an order. */
export function setWay(way) {
  update({ way, group: null, groupError: "" });
  shownAt = performance.now();
  if (way !== "pair") nextGroup();
}

/** Ask for the next group of pictures of the way that is chosen. */
export async function nextGroup() {
  const { way } = state;
  if (way === "pair") return;
  const ticket = ++asked;
  try {
    const group = await get(`api/group?way=${way}`);
    if (ticket === asked && way === state.way) update({ group: { ...group, way }, groupError: "" });
  } catch (error) {
    if (ticket === asked) update({ groupError: error.message });
  }
}

// Time away is not time spent on a choice. After a long absence other tabs or people may have clicked.
let hiddenAt = 0;
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    hiddenAt = performance.now();
  } else if (state.ready) {
    shownAt += performance.now() - hiddenAt;
    refresh().catch(() => {}); // the outbox and the next click will tell
  }
});
