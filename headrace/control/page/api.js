/* Calls to control, with the run's token where there is one. The token lives in this tab's session alone. */

const KEY = "headrace.token";

/** What control, or the way to it, said no with; `status` 0: it did not answer. */
export class Refused extends Error {
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

/** `/#token=…`: kept, and gone from the address and the history. */
export function takeTokenFromAddress() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token")?.trim();
  if (!found) return;
  keepToken(found);
  history.replaceState(null, "", location.pathname + location.search);
}

export const authorization = (value = token()) => (value ? { Authorization: `Bearer ${value}` } : {});

/** The answer as JSON. Raises `Refused`. */
export async function call(method, path, body, withToken) {
  const headers = authorization(withToken);
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers,
      cache: "no-store",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new Refused(0, "control does not answer");
  }
  const told = await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused(answer.status, detailOf(told) || `control answered ${answer.status}`);
  return told;
}

export const get = (path) => call("GET", path);

function detailOf(problem) {
  const detail = problem?.detail ?? problem?.title;
  if (Array.isArray(detail)) return detail.map((one) => `${(one.loc ?? []).slice(1).join(".")}: ${one.msg}`).join("; ");
  return typeof detail === "string" ? detail : "";
}
