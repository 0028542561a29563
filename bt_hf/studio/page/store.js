// What the page knows. Views read `state`, everything else calls `update`.

export const state = {
  ready: false, // the first /api/state has come
  session: "", // id of the session folder; another folder on this port has another one
  title: "", images: 0, prompts: 0, skipped: [], skippedCount: 0, ways: ["pair"], can: {}, note: "",
  clicks: 0,
  pairs: [], // the pair that is shown, then those that come next
  way: "pair", group: null, groupError: "",
  taste: null, job: null, stopping: false,
  unsent: 0, trouble: "", // clicks that the server has not confirmed, and why
  lost: "", // a click that the server refused for good
  view: "choose",
  drawing: null, ab: null, problem: "",
};

const listeners = new Set();

export function subscribe(listener) {
  listeners.add(listener);
}

/** Take over new values and draw the page. */
export function update(values) {
  Object.assign(state, values);
  for (const listener of listeners) listener(state);
}
