// Training in the background, before and after, the blind test, and taking the work home.
import { html } from "./html.js";
import { Starter } from "./jobs.js";
import { Blind } from "./judge.js";
import { drawingUrl } from "./pictures.js";
import { Publish } from "./publish.js";
import { state } from "./store.js";

const Drawings = ({ drawing }) => html`
  <table class="drawings">
    <caption class="unseen">Drawings of the same prompts and seeds, by the base model and with your LoRA</caption>
    <thead><tr><th scope="col">Prompt</th><th scope="col">Before</th><th scope="col">After</th></tr></thead>
    <tbody>${drawing.prompts.map((prompt, place) => html`<tr key=${place}>
      <th scope="row" dir="auto">${prompt}</th>
      <td><img src=${drawingUrl(drawing.before[place])} alt=${`before: ${prompt}`} loading="lazy" /></td>
      <td><img src=${drawingUrl(drawing.after[place])} alt=${`after: ${prompt}`} loading="lazy" /></td></tr>`)}</tbody>
  </table>`;

const no = { ok: false, why: "" };

export function Draw() {
  const { can, drawing } = state;
  return html`<article class="draw">
    <header><h1>From clicks to a model</h1>
      <p class="lead">Both trainings run in the background. You can go on choosing meanwhile.</p></header>
    <section aria-labelledby="reward"><h2 id="reward">1. A reward model of your taste</h2>
      <p>Scores any picture as you would: to rank a library, or to guide a generator.</p>
      <${Starter} kind="reward" able=${can.train || no} label="Train the reward" /></section>
    <section aria-labelledby="drawing"><h2 id="drawing">2. A drawing model of your taste</h2>
      <p>A LoRA for the pipeline that drew the pictures, trained from your clicks.</p>
      <${Starter} kind="drawing" able=${can.draw || no} label="Train the drawing LoRA" />
      ${drawing && drawing.prompts.length > 0 && html`<h3>Before and after, at the same seeds</h3><${Drawings} drawing=${drawing} />`}</section>
    <section aria-labelledby="blind"><h2 id="blind">3. The blind test</h2><${Blind} ready=${Boolean(drawing)} /></section>
    <section aria-labelledby="take"><h2 id="take">4. Take it home</h2>
      <p>Your clicks as a dataset, with their pictures:
        ${" "}<a href="api/export?format=parquet" download>Parquet</a> or <a href="api/export?format=jsonl" download>JSON Lines (zip)</a>.</p>
      <${Publish} able=${can.publish || no} /></section>
  </article>`;
}

