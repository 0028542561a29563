// Two pictures to choose from, by click, touch or keys; for choosing and for the blind test alike.
import { Component, html } from "./html.js";
import { Picture } from "./pictures.js";

const stacked = matchMedia("(max-width: 40rem) and (orientation: portrait)");
const NARROW = 0.8; // width to height; two pictures narrower than this stand beside each other on a phone, too

export class Stage extends Component {
  constructor(props) {
    super(props);
    this.state = { shapes: {}, flash: "", again: 0 };
    this.onStack = () => this.setState({});
  }

  componentDidMount() {
    stacked.addEventListener("change", this.onStack);
  }

  componentWillUnmount() {
    stacked.removeEventListener("change", this.onStack);
  }

  choose(choice) {
    // Two names for one animation: the same side twice plays it twice.
    this.setState(({ flash }) => ({ flash: `${choice}-${flash.endsWith("odd") ? "even" : "odd"}` }));
    this.props.onChoose(choice);
  }

  render({ left, right, prompt, turn }, { shapes, flash, again }) {
    const shape = (url) => shapes[url];
    const missing = [left, right].some((url) => shape(url) === null);
    const tall = [left, right].every((url) => shape(url) && shape(url) < NARROW);
    const names = stacked.matches && !tall ? { left: "Upper", right: "Lower" } : { left: "Left", right: "Right" };
    const side = (name, url) => html`
      <button type="button" key=${name} class="choice ${flash.startsWith(name) ? flash.replace(name, "flash") : ""}"
        aria-label="${names[name]} picture" aria-keyshortcuts=${name === "left" ? "ArrowLeft" : "ArrowRight"}
        aria-disabled=${missing ? "true" : null} onClick=${() => missing || this.choose(name)}>
        <${Picture} key=${`${turn} ${url} ${again}`} url=${url}
          onShape=${(ratio) => this.setState(({ shapes: { ...this.known(), [url]: ratio } }))} />
        <span class="choice-key" aria-hidden="true">${name === "left" ? "←" : "→"}</span>
      </button>`;
    return html`
      <div class="stage ${tall ? "stage-tall" : ""}" role="group" aria-label=${`Two pictures for: ${prompt}`}>
        ${side("left", left)}${side("right", right)}
      </div>
      ${missing && html`<p class="notice" role="alert">
        A picture of this pair can't be loaded.
        <button type="button" class="link" onClick=${() => this.setState({ again: again + 1, shapes: {} })}>Try again</button>
        or skip the pair.</p>`}`;
  }

  /** Shapes of the two pictures on the page; those of earlier ones are forgotten. */
  known() {
    const { left, right } = this.props;
    return Object.fromEntries(Object.entries(this.state.shapes).filter(([url]) => url === left || url === right));
  }
}

/** The prompt as the heading; a very long one scrolls in its box, also by keyboard. */
export const Prompt = ({ text }) => html`
  <h1 class="prompt ${text.length > 90 ? "prompt-long" : ""}" dir="auto" tabindex=${text.length > 240 ? 0 : null}>${text || "Which do you like better?"}</h1>`;

/** Button with its key beside it. */
export const KeyButton = ({ label, keyName, shortcut, onClick, disabled }) => html`
  <button type="button" class="control" aria-keyshortcuts=${shortcut} onClick=${onClick} disabled=${disabled}>
    ${label}<kbd aria-hidden="true">${keyName}</kbd>
  </button>`;
