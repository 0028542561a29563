// The running accuracy as a curve: model with its interval, base beside it. SVG, so that it follows the theme and scales.
import { html, percent } from "./html.js";

const LEFT = 50, RIGHT = 94, TOP = 12, BOTTOM = 28; // margins for the labels

/** Points of a polyline; a gap where the value is not known yet. */
function path(points, x, y, value) {
  let drawn = "", pen = "M";
  for (const point of points) {
    if (point[value] === null || point[value] === undefined) {
      pen = "M";
      continue;
    }
    drawn += `${pen}${x(point.n).toFixed(1)} ${y(point[value]).toFixed(1)}`;
    pen = "L";
  }
  return drawn;
}

/** Step of the axis that gives three to six labels. */
export function step(last) {
  for (let power = 1; ; power *= 10) {
    for (const digit of [1, 2, 5]) if (last / (digit * power) <= 6) return digit * power;
  }
}

/** Sentence with the numbers of the last point, for those who don't see the curve. */
export function inWords({ n, model, low, high, base }) {
  const versus = base === null || base === undefined ? "" : `; the base, on ${percent(base)}`;
  return `Of ${n} pairs drawn at random, each predicted before its click was used, the model was right on ${percent(model)} (${percent(low)} to ${percent(high)})${versus}.`;
}

/** Curve of a size in pixels; narrower places scale it down. */
export function Curve({ accuracy, width = 640, height = 260 }) {
  const points = accuracy.curve;
  const last = points[points.length - 1];
  const span = Math.max(last.n, 10);
  const x = (n) => LEFT + (n / span) * (width - LEFT - RIGHT);
  const y = (share) => TOP + (1 - share) * (height - TOP - BOTTOM);
  const banded = points.filter((point) => point.low !== null && point.low !== undefined);
  const corners = (list, value) => list.map((point) => `${x(point.n).toFixed(1)},${y(point[value]).toFixed(1)}`);
  const band = [...corners(banded, "high"), ...corners([...banded].reverse(), "low")].join(" ");
  const ticks = [];
  for (let n = 0; n <= span; n += step(span)) ticks.push(n);
  const known = last.base !== null && last.base !== undefined;
  // Labels at the ends of the lines; they must not cover each other.
  const ends = { model: y(last.model) + 4, base: known ? y(last.base) + 4 : 0 };
  if (known && Math.abs(ends.model - ends.base) < 18) ends.base = ends.model + (ends.base >= ends.model ? 18 : -18);
  return html`<svg class="curve" viewBox="0 0 ${width} ${height}" role="img" aria-label=${inWords(last)}>
    ${[0, 0.5, 1].map((share) => html`<g key=${share}>
      <line class=${share === 0.5 ? "chance" : "grid"} x1=${LEFT} x2=${width - RIGHT} y1=${y(share)} y2=${y(share)} />
      <text x=${LEFT - 8} y=${y(share) + 4} text-anchor="end">${percent(share)}</text></g>`)}
    ${ticks.map((n) => html`<text key=${n} x=${x(n)} y=${height - 8} text-anchor="middle">${n}</text>`)}
    <polygon class="band" points=${band} />
    <path class="base" d=${path(points, x, y, "base")} />
    <path class="model" d=${path(points, x, y, "model")} />
    <circle class="end" cx=${x(last.n)} cy=${y(last.model)} r="4" />
    <text class="label-model" x=${x(last.n) + 10} y=${ends.model}>yours ${percent(last.model)}</text>
    ${known && html`<text class="label-base" x=${x(last.n) + 10} y=${ends.base}>base ${percent(last.base)}</text>`}
  </svg>`;
}
