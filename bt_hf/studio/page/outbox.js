// Clicks on their way to the server: kept in memory and in the browser's storage until each is confirmed, sent in
// order, one at a time. Ids make a click that is sent twice count once, so another tab may send it as well.
import { ApiError, post } from "./api.js";
import { state, update } from "./store.js";

const PAUSES = [1000, 2000, 4000, 8000, 15000, 30000]; // between tries, in milliseconds
const entries = []; // {path, body, at}
let onReply = () => {};
let onRefused = () => {};
let sending = false;
let failures = 0;
let timer = 0;

const prefix = () => `bt-hf-studio/${state.session}/`;

// Storage may be full, forbidden or absent (private windows): memory alone serves then.
const store = (entry) => attempt(() => localStorage.setItem(prefix() + entry.body.id, JSON.stringify(entry)));
const forget = (entry) => attempt(() => localStorage.removeItem(prefix() + entry.body.id));

function attempt(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

/** Take over what an earlier page of this session could not send, and start sending. `replied(reply, entry)` is called
 * for each confirmed entry, `refused(entry)` for one that the server will never take. */
export function open(replied, refused) {
  onReply = replied;
  onRefused = refused;
  const known = new Set(entries.map((entry) => entry.body.id));
  const found = attempt(() => Object.keys(localStorage).filter((key) => key.startsWith(prefix()))) || [];
  for (const key of found) {
    const entry = attempt(() => JSON.parse(localStorage.getItem(key)));
    if (entry && entry.body && !known.has(entry.body.id)) entries.push(entry);
  }
  entries.sort((one, other) => one.at - other.at);
  send();
}

// After sleep or a lost connection: at once, and not when the timer comes round.
addEventListener("online", () => retry());
document.addEventListener("visibilitychange", () => document.hidden || retry());

/** Put a click, judgement or undo in line; it is sent in the background. */
export function put(path, body) {
  const entry = { path, body, at: Date.now() };
  entries.push(entry);
  store(entry);
  send();
}

/** Ids of the pairs whose answers are still unsent; the server may still list these pairs. */
export const answered = () => new Set(entries.map((entry) => entry.body.pair).filter(Boolean));

/** Clicks that the unsent entries add; an undo takes one away. */
export const balance = () => entries.reduce((sum, { path }) => sum + (path === "api/undo" ? -1 : 1), 0);

/** Try again now. */
export function retry() {
  clearTimeout(timer);
  send();
}

async function send() {
  if (sending) return;
  sending = true;
  clearTimeout(timer);
  while (entries.length) {
    update({ unsent: entries.length });
    const entry = entries[0];
    try {
      const reply = await post(entry.path, entry.body);
      settle(entry);
      failures = 0;
      update({ unsent: entries.length, trouble: "" });
      onReply(reply, entry);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status >= 400 && error.status < 500 && ![401, 408, 429].includes(error.status)) {
        settle(entry); // a pair of another session, say: it would be refused for ever
        update({ lost: error.message });
        onRefused(entry);
        continue;
      }
      update({ unsent: entries.length, trouble: error.message });
      timer = setTimeout(send, PAUSES[Math.min(failures, PAUSES.length - 1)]);
      failures += 1;
      break;
    }
  }
  update({ unsent: entries.length });
  sending = false;
}

function settle(entry) {
  entries.splice(entries.indexOf(entry), 1);
  forget(entry);
}
