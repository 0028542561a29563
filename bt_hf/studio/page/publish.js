// Publishing on the Hub: the card is read before it goes; private and without the person's pictures unless they say so.
import { get } from "./api.js";
import { Component, html } from "./html.js";
import { Job, start } from "./jobs.js";
import { state } from "./store.js";

export class Publish extends Component {
  constructor(props) {
    super(props);
    this.state = { open: false, card: "", repo: "", private: true, images: false, error: "" };
  }

  async preview(images) {
    try {
      const { markdown } = await get(`api/card?show_images=${images}`);
      this.setState({ open: true, card: markdown, images, error: "" });
    } catch (error) {
      this.setState({ open: true, images, error: error.message });
    }
  }

  render({ able }, { open, card, repo, private: hidden, images, error }) {
    const busy = state.job && state.job.state === "running";
    if (!able.ok) return html`<p><button type="button" class="button" disabled>Publish on the Hub</button> <span class="hint">${able.why}</span></p>`;
    if (!open) return html`<p><button type="button" class="button" onClick=${() => this.preview(false)}>Publish on the Hub …</button></p>
      <${Job} kind="publish" />`;
    const publish = (event) => {
      event.preventDefault();
      start("publish", { repo_id: repo.trim(), private: hidden, show_images: images });
    };
    return html`<form class="publish" onSubmit=${publish}>
      <label class="field">Repository
        <input type="text" required autocomplete="off" spellcheck=${false} placeholder="you/my-taste" pattern="[\\w.\\-]+/[\\w.\\-]+"
          title="user/name" value=${repo} onInput=${(event) => this.setState({ repo: event.target.value })} /></label>
      <label class="check"><input type="checkbox" checked=${hidden} onChange=${(event) => this.setState({ private: event.target.checked })} />
        <span>Private: only you can see it</span></label>
      <label class="check"><input type="checkbox" checked=${images} onChange=${(event) => this.preview(event.target.checked)} />
        <span>Show my pictures in the card</span></label>
      <h3 id="card">The card, as it will stand there</h3>
      ${error ? html`<p class="notice" role="alert">${error}</p>` : html`<pre class="card" tabindex="0" aria-labelledby="card">${card}</pre>`}
      <p><button type="submit" class="button" disabled=${busy || Boolean(error)}>${hidden ? "Publish privately" : "Publish for everyone"}</button>
        <button type="button" class="control" onClick=${() => this.setState({ open: false })}>Cancel</button></p>
      <${Job} kind="publish" />
    </form>`;
  }
}
