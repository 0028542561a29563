// Pictures of the person's own, where the studio takes them.
import { upload } from "./api.js";
import { refresh } from "./choosing.js";
import { announce, Component, count, html, sentence } from "./html.js";
import { state } from "./store.js";

export class Uploads extends Component {
  constructor(props) {
    super(props);
    this.state = { prompt: "", of: 0, done: 0, failed: [] };
  }

  /** Send the chosen files one after the other; what is refused is named with its reason, and the others go on. */
  async send(event) {
    const files = [...event.target.files];
    event.target.value = ""; // the same files may be chosen again
    this.setState({ of: files.length, done: 0, failed: [] });
    const failed = [];
    for (const [place, file] of files.entries()) {
      try {
        await upload(file, this.state.prompt.trim());
      } catch (error) {
        failed.push(`${file.name}: ${sentence(error.message)}`);
      }
      this.setState({ done: place + 1, failed });
    }
    this.setState({ of: 0 });
    announce(`${count(files.length - failed.length, "picture")} added.`);
    await refresh().catch(() => {});
  }

  render({ open }, { prompt, of, done, failed }) {
    return html`<details class="skipped" open=${open || failed.length > 0}>
      <summary>Add pictures</summary>
      <div class="publish">
        <label class="field">Prompt: what all of them show
          <input type="text" dir="auto" value=${prompt} onInput=${(event) => this.setState({ prompt: event.target.value })} /></label>
        <label class="field">Pictures
          <input type="file" multiple accept="image/*" disabled=${of > 0} onChange=${(event) => this.send(event)} /></label>
        ${of > 0 && html`<p class="job"><progress aria-label="Pictures sent" max=${of} value=${done}></progress>${done} of ${of}</p>`}
        ${failed.length > 0 && html`<ul class="notice-start" role="alert">${failed.map((text) => html`<li key=${text}>${text}</li>`)}</ul>`}
        <p class="hint">${count(state.images, "picture")} so far. Their pixels alone are kept.</p>
      </div></details>`;
  }
}
