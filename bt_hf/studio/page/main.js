// The frame of the page: where we are, whether all is saved, and which keys do what.
import { keys as chooseKeys, Choose } from "./choose.js";
import { clicksSoFar, refresh } from "./choosing.js";
import { Draw } from "./draw.js";
import { count, html, render } from "./html.js";
import { look } from "./jobs.js";
import { keys as judgeKeys } from "./judge.js";
import { retry } from "./outbox.js";
import { state, subscribe, update } from "./store.js";
import { Taste } from "./taste.js";

const VIEWS = { choose: ["Choose", Choose], taste: ["Taste", Taste], draw: ["Model", Draw] };
const KEYS = { choose: chooseKeys, draw: judgeKeys };

const Saved = () => html`<p class="saved" role="status" data-unsent=${state.unsent}>
  ${state.trouble ? `${state.unsent} unsaved` : count(clicksSoFar(), "click")}</p>`;

const Notices = () => html`
  ${state.trouble && html`<div class="banner" role="alert"><p><b>${count(state.unsent, "click")} not saved yet.</b> ${state.trouble}
    ${state.unsent === 1 ? " It is" : " They are"} kept in this browser and sent again.</p>
    <button type="button" class="control" onClick=${retry}>Try now</button></div>`}
  ${state.lost && html`<div class="banner" role="alert"><p><b>A click could not be taken.</b> ${state.lost}</p>
    <button type="button" class="control" onClick=${() => update({ lost: "" })}>All right</button></div>`}
  ${state.problem && html`<div class="banner" role="alert"><p>${state.problem}</p>
    <button type="button" class="control" onClick=${state.ready ? () => update({ problem: "" }) : open}>${state.ready ? "All right" : "Try again"}</button></div>`}`;

function App() {
  const [, View] = VIEWS[state.view];
  return html`
    <header class="top">
      <a class="skip-link" href="#main" onClick=${toMain}>To the pictures</a>
      <p class="brand">${state.title || "bt_hf studio"}</p>
      <nav aria-label="Parts of the studio"><ul>${Object.entries(VIEWS).map(([name, [label]]) => html`
        <li key=${name}><a href=${`#${name}`} aria-current=${name === state.view ? "page" : null}>${label}</a></li>`)}</ul></nav>
      <${Saved} />
    </header>
    <${Notices} />
    <main id="main" tabindex="-1">${state.ready ? html`<${View} />` : html`<p class="loading" role="status">Opening the studio …</p>`}</main>`;
}

function toMain(event) {
  event.preventDefault(); // the address names a view
  document.getElementById("main").focus();
}

function route() {
  const name = location.hash.slice(1);
  const moved = state.view !== name && state.ready;
  update({ view: name in VIEWS ? name : "choose" });
  document.title = `${VIEWS[state.view][0]} · ${state.title || "bt_hf studio"}`;
  if (state.view === "draw" && state.ready) look();
  if (moved) {
    scrollTo(0, 0);
    document.getElementById("main").focus({ preventScroll: true });
  }
}

/** Keys are for pictures, unless something that needs them itself has the focus. */
function onKey(event) {
  if (event.defaultPrevented || event.altKey || event.repeat || !state.ready) return;
  const undone = (event.ctrlKey || event.metaKey) && event.key === "z";
  if ((event.ctrlKey || event.metaKey || event.shiftKey) && !undone) return;
  if (event.target.closest("input, textarea, select, pre, .prompt-long")) return;
  const action = (KEYS[state.view] || {})[undone ? "Backspace" : event.key];
  if (action && action() !== false) event.preventDefault();
}

async function open() {
  try {
    await refresh();
    route();
  } catch (error) {
    update({ problem: error.message });
  }
}

const root = document.getElementById("app");
root.replaceChildren();
subscribe(() => render(html`<${App} />`, root));
addEventListener("hashchange", route);
addEventListener("keydown", onKey);
route();
open();
