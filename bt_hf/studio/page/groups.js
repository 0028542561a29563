// Several pictures of one prompt: stars, the best one, or an order.
import { Component, announce, html } from "./html.js";
import { judge } from "./choosing.js";
import { Picture, imageUrl } from "./pictures.js";
import { Prompt } from "./stage.js";

const STARS = [1, 2, 3, 4, 5];

/** One group; `foot` draws the controls under it around the button that saves. */
export const Group = ({ group, foot }) => html`
  <${Prompt} text=${group.prompt} />
  ${group.way === "stars" && html`<${Stars} group=${group} foot=${foot} />`}
  ${group.way === "best" && html`<${Best} group=${group} foot=${foot} />`}
  ${group.way === "rank" && html`<${Rank} group=${group} foot=${foot} />`}`;

class Stars extends Component {
  constructor(props) {
    super(props);
    this.state = { stars: {} };
  }

  render({ group, foot }, { stars }) {
    const given = Object.keys(stars).length;
    return html`
      <ul class="group group-stars">
        ${group.images.map((image, place) => html`<li key=${image}>
          <${Picture} url=${imageUrl(image)} />
          <fieldset class="stars">
            <legend class="unseen">Stars for picture ${place + 1}</legend>
            ${STARS.map((star) => html`<label key=${star} class=${star <= (stars[image] || 0) ? "on" : ""}>
              <input type="radio" name=${`stars-${group.id}-${image}`} value=${star} checked=${stars[image] === star}
                onChange=${() => this.setState({ stars: { ...stars, [image]: star } })} />
              <span aria-hidden="true">★</span><span class="unseen">${star === 1 ? "1 star" : `${star} stars`}</span>
            </label>`)}
          </fieldset></li>`)}
      </ul>
      ${foot(html`<button type="button" class="button" disabled=${given < 2} onClick=${() => judge({ stars })}>
        ${given < 2 ? "Give stars to two" : "Save"}</button>`)}`;
  }
}

const Best = ({ group, foot }) => html`
  <ul class="group group-best">
    ${group.images.map((image, place) => html`<li key=${image}>
      <button type="button" class="choice" aria-label=${`Picture ${place + 1} is the best`} onClick=${() => judge({ best: image })}>
        <${Picture} url=${imageUrl(image)} />
      </button></li>`)}
  </ul>
  ${foot(null)}`;

class Rank extends Component {
  constructor(props) {
    super(props);
    this.state = { order: props.group.images, dragged: null };
  }

  /** Put a picture at another place; the focus goes with it. */
  move(image, place, focus) {
    const { order } = this.state;
    if (place < 0 || place >= order.length || order[place] === image) return;
    const others = order.filter((other) => other !== image);
    this.setState({ order: [...others.slice(0, place), image, ...others.slice(place)] }, () => {
      if (focus) document.getElementById(`rank-${image}-${focus}`)?.focus();
    });
    announce(`Place ${place + 1} of ${order.length}.`);
  }

  drag(event, image) {
    if (event.button || event.target.closest("button")) return;
    event.preventDefault();
    event.currentTarget.setPointerCapture(event.pointerId);
    this.setState({ dragged: image });
  }

  over(event) {
    const { dragged, order } = this.state;
    if (dragged === null) return;
    const under = document.elementsFromPoint(event.clientX, event.clientY).map((element) => element.closest("[data-image]"))
      .find((element) => element && element.dataset.image !== String(dragged));
    if (!under) return;
    const box = under.getBoundingClientRect();
    const place = order.findIndex((image) => String(image) === under.dataset.image);
    // Only past the middle of the other picture: two of different size would change places for ever.
    const forwards = place > order.indexOf(dragged);
    const wide = box.width < innerWidth / 2;
    const passed = wide ? event.clientX - box.left > box.width / 2 : event.clientY - box.top > box.height / 2;
    if (passed === forwards) this.move(dragged, place);
  }

  key(event, image, place) {
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    this.move(image, place + step, event.target.id.endsWith("earlier") ? "earlier" : "later");
  }

  render({ group, foot }, { order, dragged }) {
    return html`
      <p class="hint centred">Best first. Drag the pictures, or use the arrows under them.</p>
      <ol class="group group-rank">
        ${order.map((image, place) => html`<li key=${image} data-image=${image} class=${image === dragged ? "dragged" : ""}
            onPointerDown=${(event) => this.drag(event, image)} onPointerMove=${(event) => this.over(event)}
            onPointerUp=${() => this.setState({ dragged: null })} onPointerCancel=${() => this.setState({ dragged: null })}
            onKeyDown=${(event) => this.key(event, image, place)}>
          <span class="rank-place" aria-hidden="true">${place + 1}</span>
          <${Picture} url=${imageUrl(image)} />
          <span class="rank-moves">
            <button type="button" id=${`rank-${image}-earlier`} class="control" aria-disabled=${place === 0}
              aria-label=${`Picture at place ${place + 1}: move to a better place`} onClick=${() => this.move(image, place - 1, "earlier")}>←</button>
            <button type="button" id=${`rank-${image}-later`} class="control" aria-disabled=${place === order.length - 1}
              aria-label=${`Picture at place ${place + 1}: move to a worse place`} onClick=${() => this.move(image, place + 1, "later")}>→</button>
          </span></li>`)}
      </ol>
      ${foot(html`<button type="button" class="button" onClick=${() => judge({ ranking: order })}>Save this order</button>`)}`;
  }
}
