// Requests to the studio's own server, and nowhere else.

/** An answer other than 2xx (`status` is its code), or none at all (`status` is 0). */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const TIMEOUT = 30000, UPLOADING = 300000; // milliseconds

async function ask(path, options = {}, timeout = TIMEOUT) {
  let response;
  try {
    response = await fetch(path, { ...options, signal: AbortSignal.timeout(timeout) });
  } catch {
    throw new ApiError(0, "The studio does not answer. Is it still running?");
  }
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) {
    throw new ApiError(401, "The studio was started anew. Open the address that it printed in its terminal.");
  }
  if (!response.ok) throw new ApiError(response.status, body.error || `The studio answered ${response.status}.`);
  return body;
}

export const get = (path) => ask(path, { headers: { Accept: "application/json" } });

export const post = (path, body = {}) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** Send a picture as it is; the server keeps its pixels alone. */
export const upload = (file, prompt) => {
  const about = new URLSearchParams({ name: file.name.slice(0, 100), ...(prompt ? { prompt } : {}) });
  return ask(`api/images?${about}`, { method: "POST", headers: { "Content-Type": file.type || "image/png" }, body: file }, UPLOADING);
};
