// Pictures, loaded and decoded before they are needed.
import { Component, html } from "./html.js";
import { state } from "./store.js";

const KEPT = 24; // decoded pictures in memory; the oldest go first
const loaded = new Map(); // address -> {element, ready}

// The session is part of the address: another folder on this port must not be shown from the browser's cache.
export const imageUrl = (number, size) =>
  `api/images/${number}?${size ? `size=${size}&` : ""}s=${encodeURIComponent(state.session)}`;

export const drawingUrl = (name) => `api/drawings/${encodeURIComponent(name)}?s=${encodeURIComponent(state.session)}`;

/** Load and decode a picture. `ready` resolves to true, or to false where there is none (any more). */
export function load(url) {
  let picture = loaded.get(url);
  if (picture) {
    loaded.delete(url); // and to the end of the line
  } else {
    const element = new Image();
    element.alt = "";
    element.decoding = "sync"; // decoded below already: shown in the same frame as its neighbour
    element.src = url;
    picture = { element, ready: element.decode().then(() => true, () => false) };
    picture.ready.then((good) => good || loaded.delete(url)); // the next time it is tried again
  }
  loaded.set(url, picture);
  for (const oldest of loaded.keys()) {
    if (loaded.size <= KEPT) break;
    loaded.delete(oldest);
  }
  return picture;
}

/** A decoded picture in a frame; the frame says so when it cannot be loaded. */
export class Picture extends Component {
  constructor(props) {
    super(props);
    this.state = { missing: false };
  }

  componentDidMount() {
    this.show();
  }

  componentDidUpdate(before) {
    if (before.url !== this.props.url) this.show();
  }

  async show() {
    const { url, onShape } = this.props;
    const { element, ready } = load(url);
    this.frame.replaceChildren(element);
    if (this.state.missing) this.setState({ missing: false });
    const good = await ready;
    if (url !== this.props.url) return; // another one is shown by now
    if (!good) {
      this.frame.replaceChildren();
      this.setState({ missing: true });
    }
    if (onShape) onShape(good ? element.naturalWidth / element.naturalHeight : null);
  }

  render({ }, { missing }) {
    return html`<span class="picture">
      <span class="picture-frame" ref=${(element) => { this.frame = element; }}></span>
      ${missing && html`<span class="picture-missing">This picture can't be loaded</span>`}
    </span>`;
  }
}
