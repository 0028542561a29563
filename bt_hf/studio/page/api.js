// Requests to the studio's own server, and nowhere else.

/** An answer other than 2xx (`status` is its code), or none at all (`status` is 0). */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}, timeout = 30000) {
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
