// Publishing on the Hub: the card is read before it goes; private and without the person's pictures unless they say so.
import { get } from "./api.js";
import { Component, html, sentence } from "./html.js";
import { Job, start } from "./jobs.js";
import { state } from "./store.js";

const WHAT = { drawing: "The drawing LoRA", reward: "The reward model", pairs: "My clicks, as a dataset" };

export class Publish extends Component {
  constructor(props) {
    super(props);
    this.state = { open: false, what: "drawing", card: "", repo: "", base: "", private: true, images: false, error: "" };
  }

  /** Fetch the card as it would be published; a dataset's is written by the Hub's own client. */
  async preview(what, images) {
    this.setState({ open: true, what, images });
    try {
      const { markdown } = what === "pairs" ? { markdown: "" } : await get(`api/card?what=${what}&show_images=${images}`);
      this.setState({ card: markdown, error: "" });
    } catch (error) {
      this.setState({ card: "", error: error.message });
    }
  }

  publish(event) {
    event.preventDefault();
    const { what, repo, base, private: hidden, images } = this.state;
    const options = { what, repo_id: repo.trim(), private: hidden, show_images: what !== "pairs" && images };
    start("publish", base.trim() ? { ...options, base_model: base.trim() } : options);
  }

  render({ able }, { open, what, card, repo, base, private: hidden, images, error }) {
    const busy = state.job && state.job.state === "running";
    if (!able.ok) return html`<p class="action"><button type="button" class="button" disabled>Publish on the Hub</button> <span class="hint">${sentence(able.why)}</span></p>`;
    if (!open) return html`<p><button type="button" class="button" onClick=${() => this.preview(state.drawing ? "drawing" : "reward", false)}>
        Publish on the Hub …</button></p><${Job} kind="publish" />`;
    const text = (name) => (event) => this.setState({ [name]: event.target.value });
    return html`<form class="publish" onSubmit=${(event) => this.publish(event)}>
      <label class="field">What
        <select value=${what} onChange=${(event) => this.preview(event.target.value, images)}>
          ${Object.entries(WHAT).map(([name, label]) => html`<option key=${name} value=${name}>${label}</option>`)}</select></label>
      <label class="field">Repository
        <input type="text" required autocomplete="off" spellcheck=${false} placeholder="you/my-taste" value=${repo} onInput=${text("repo")} /></label>
      <label class="check"><input type="checkbox" checked=${hidden} onChange=${(event) => this.setState({ private: event.target.checked })} />
        <span>Private: only you can see it</span></label>
      ${what === "pairs" ? html`<p class="notice-start">The dataset holds the pictures of your clicks.</p>` : html`
        <label class="check"><input type="checkbox" checked=${images} onChange=${(event) => this.preview(what, event.target.checked)} />
          <span>Show my pictures in the card</span></label>
        <label class="field">Base model on the Hub, if it was a folder of yours
          <input type="text" autocomplete="off" spellcheck=${false} value=${base} onInput=${text("base")} /></label>
        <h3 id="card">The card, as it will stand there</h3>
        ${error ? html`<p class="notice-start" role="alert">${sentence(error)}</p>` : html`<pre class="card" tabindex="0" aria-labelledby="card">${card}</pre>`}`}
      <p><button type="submit" class="button" disabled=${busy || Boolean(error)}>${hidden ? "Publish privately" : "Publish for everyone"}</button>
        ${" "}<button type="button" class="control" onClick=${() => this.setState({ open: false })}>Cancel</button></p>
      <${Job} kind="publish" />
    </form>`;
  }
}
