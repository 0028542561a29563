// What was learnt: the verdict, the running accuracy, words, and the pictures in the order of this taste.
import { count, html, percent, unbroken } from "./html.js";
import { Curve, inWords } from "./curve.js";
import { imageUrl } from "./pictures.js";
import { state } from "./store.js";

const MARKED = 3; // the biggest movers of a click are marked, not everyone who moved by a place

/** Images of the biggest moves, at least two places. */
function movers(ranking) {
  const moved = ranking.filter(({ move }) => Math.abs(move) > 1).sort((one, other) => Math.abs(other.move) - Math.abs(one.move));
  return new Set(moved.slice(0, MARKED).map(({ image }) => image));
}

const Move = ({ move }) => html`<span class="move ${move > 0 ? "up" : "down"}">
  <span aria-hidden="true">${move > 0 ? "▲" : "▼"} ${Math.abs(move)}</span>
  <span class="unseen">${move > 0 ? "up" : "down"} ${Math.abs(move)}</span></span>`;

/** Pictures, best first. */
export function Ranking({ ranking, most }) {
  const marked = movers(ranking);
  return html`<ol class="ranking">
    ${ranking.slice(0, most).map(({ image, prompt, move }) => html`<li key=${image} class=${marked.has(image) ? "moved" : ""}>
      <img src=${imageUrl(image, 256)} alt=${prompt || "picture without a caption"} title=${prompt} loading="lazy" decoding="async" />
      ${marked.has(image) && html`<${Move} move=${move} />`}</li>`)}
  </ol>`;
}

const curved = (taste) => taste && taste.accuracy && taste.accuracy.curve.length > 1;

const Words = ({ words }) => html`
  <div class="words">
    <div><h3>Towards</h3><ul>${words.towards.map((word) => html`<li key=${word}>${word}</li>`)}</ul></div>
    <div><h3>Away from</h3><ul>${words.away.map((word) => html`<li key=${word}>${word}</li>`)}</ul></div>
  </div>`;

const known = (words) => words && (words.towards.length > 0 || words.away.length > 0);

/** Narrow column beside the pair, on wide screens; the taste view has it all. */
export function Aside() {
  const { taste } = state;
  if (!taste || !taste.clicks) {
    return html`<aside class="aside" aria-label="What is learnt">
      <p class="hint">Each click teaches. After a few of them, what was learnt about your taste stands here.</p></aside>`;
  }
  return html`<aside class="aside" aria-label="What is learnt">
    <p class="aside-verdict">${unbroken(taste.verdict)}</p>
    ${curved(taste) && html`<${Curve} accuracy=${taste.accuracy} width=${304} height=${150} />`}
    ${known(taste.words) && html`<p class="aside-words"><b>Towards</b> ${taste.words.towards.join(", ") || "nothing that has a word yet"}</p>`}
    ${taste.ranking.length > 0 && html`<h2>As you would rank them</h2><${Ranking} ranking=${taste.ranking} most=${9} />`}
    <p><a href="#taste">All of it</a></p>
  </aside>`;
}

export function Taste() {
  const { taste } = state;
  if (!taste || !taste.clicks) {
    return html`<div class="empty"><h1>Nothing is learnt yet</h1>
      <p>Each click is predicted before it is used. After a few of them, the curve, the words and the ranking stand here.</p>
      <p><a class="button" href="#choose">Choose</a></p></div>`;
  }
  const { accuracy } = taste;
  return html`<article class="taste">
    <header><p class="eyebrow">After ${count(taste.clicks, "click")}</p><h1>${unbroken(taste.verdict)}</h1>
      ${taste.worth && html`<p class="lead">${taste.worth}</p>`}</header>
    <section aria-labelledby="accuracy"><h2 id="accuracy">How often it is right</h2>
      ${curved(taste)
        ? html`<${Curve} accuracy=${accuracy} /><p class="hint">${inWords(accuracy.curve[accuracy.curve.length - 1])}${" "}
            The band is a 95 % interval, the dashed line the base model, the dotted one a coin.</p>`
        : html`<p class="hint">Some of the pairs are drawn at random to measure this; the curve begins with the second of them.</p>`}
      ${taste.self && html`<p>You agreed with yourself on <b>${percent(taste.self.share)}</b> of ${count(taste.self.n, "pair")} that came back.
        No model can be right more often than that.</p>`}</section>
    ${known(taste.words) && html`<section aria-labelledby="words"><h2 id="words">In words</h2><${Words} words=${taste.words} /></section>`}
    ${taste.ranking.length > 0 && html`<section aria-labelledby="ranking"><h2 id="ranking">As you would rank them</h2>
      <${Ranking} ranking=${taste.ranking} most=${60} /></section>`}
  </article>`;
}
