// The blind test: a drawing of the base beside one of the LoRA, sides hidden; the votes become clicks.
import { get, post } from "./api.js";
import { announce, html, unbroken, uuid } from "./html.js";
import { drawingUrl, load } from "./pictures.js";
import { KeyButton, Stage } from "./stage.js";
import { state, update } from "./store.js";

async function take(request) {
  try {
    const ab = await request;
    if (!ab.done) [ab.left, ab.right].forEach((name) => load(drawingUrl(name)));
    update({ ab, problem: "" });
    return ab;
  } catch (error) {
    update({ problem: error.message });
    return null;
  }
}

async function begin() {
  if (await take(get("api/ab"))) document.querySelector(".blind")?.scrollIntoView({ block: "center" });
}

let voting = false;

export async function vote(choice) {
  if (voting || !state.ab || state.ab.done) return;
  voting = true;
  const { id } = state.ab;
  const ab = await take(post("api/ab", { id, choice, vote: uuid() }));
  voting = false;
  if (ab) announce(ab.done ? ab.sentence : `${ab.judged} of ${ab.of}. Next: ${ab.prompt}`);
}

export function Blind({ ready }) {
  const { ab } = state;
  if (!ab) {
    return html`<p>Base against LoRA on prompts that it was not trained on, with the sides hidden. It ends with a win rate and its interval.</p>
      <p class="action"><button type="button" class="button" disabled=${!ready} onClick=${begin}>Begin the blind test</button>
      ${!ready && html` <span class="hint">Train the drawing LoRA first.</span>`}</p>`;
  }
  if (ab.done) {
    return html`<p class="sentence">${unbroken(ab.sentence)}</p>
      <dl class="tally"><div><dt>LoRA</dt><dd>${ab.lora}</dd></div><div><dt>Ties</dt><dd>${ab.ties}</dd></div><div><dt>Base</dt><dd>${ab.base}</dd></div></dl>`;
  }
  return html`<div class="blind">
    <p class="prompt" dir="auto">${ab.prompt}</p>
    <${Stage} turn=${ab.id} prompt=${ab.prompt} left=${drawingUrl(ab.left)} right=${drawingUrl(ab.right)} onChoose=${vote} />
    <div class="controls"><${KeyButton} label="Tie" keyName="↓" shortcut="ArrowDown" onClick=${() => vote("tie")} />
      <span class="hint">${ab.judged + 1} of ${ab.of}</span></div></div>`;
}

/** Keys while a blind test runs. */
const pressed = (side) => {
  if (!state.ab || state.ab.done) return false;
  document.querySelectorAll(".blind .choice")[side]?.click();
  return true;
};

export const keys = {
  ArrowLeft: () => pressed(0),
  ArrowRight: () => pressed(1),
  ArrowDown: () => state.ab && !state.ab.done && (vote("tie"), true),
};
