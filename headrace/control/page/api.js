/* Requests to control, with the run's token if there is one. The token is kept in the session storage of this tab only. */

const KEY = "headrace.token";

/** A request that failed; `status` is 0 if control did not answer. */
export class RequestFailed extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export const token = () => sessionStorage.getItem(KEY);

export function keepToken(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** Keeps the token of `/#token=…`, and removes it from the address and the browser's history. */
export function takeTokenFromAddress() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token")?.trim();
  if (!found) return;
  keepToken(found);
  history.replaceState(null, "", location.pathname + location.search);
}

export const authorization = (value = token()) => (value ? { Authorization: `Bearer ${value}` } : {});

/** The response as JSON. Throws `RequestFailed`. */
export async function call(method, path, body, withToken) {
  const headers = authorization(withToken);
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new RequestFailed(0, "control does not answer");
  }
  const content = await response.json().catch(() => null);
  if (!response.ok) throw new RequestFailed(response.status, detailOf(content) || `control answered ${response.status}`);
  return content;
}

export const get = (path) => call("GET", path);

function detailOf(problem) {
  const detail = problem?.detail ?? problem?.title;
  if (Array.isArray(detail)) return detail.map((one) => `${(one.loc ?? []).slice(1).join(".")}: ${one.msg}`).join("; ");
  return typeof detail === "string" ? detail : "";
}
