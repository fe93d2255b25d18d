/* Commands to the run: sign-in, confirmation dialogs, and notices with control's responses. */

import { RequestFailed, call, keepToken, token } from "./api.js";
import { byId, el, setText } from "./dom.js";

const NOTICE_MS = 12_000;

/** Opens the dialog; resolves to true if the person confirms. */
export function confirmed(title, text, verb) {
  const dialog = byId("confirm");
  setText(byId("confirm-title"), title);
  setText(byId("confirm-text"), text);
  const [no, yes] = dialog.querySelectorAll("button");
  setText(yes, verb);
  dialog.returnValue = "";
  dialog.showModal();
  no.focus();
  return new Promise((resolve) => {
    no.onclick = () => dialog.close("no");
    yes.onclick = () => dialog.close("yes");
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
  });
}

export function notify(text, isBad = false) {
  const notice = el(
    "p",
    { class: isBad ? "bad" : "" },
    text,
    el("button", { class: "quiet", "aria-label": "Dismiss", onclick: () => notice.remove() }, "×"),
  );
  byId("notices").append(notice);
  while (byId("notices").children.length > 4) byId("notices").firstChild.remove();
  setTimeout(() => notice.remove(), isBad ? 2 * NOTICE_MS : NOTICE_MS);
}

export class Steering {
  constructor(store, onSignIn) {
    this.store = store;
    this.onSignIn = onSignIn;
    byId("sign").addEventListener("click", () => (token() ? this.signOut() : this.signIn()));
    byId("sign-in")
      .querySelector("form")
      .addEventListener("submit", (event) => this.#typed(event));
    byId("sign-in")
      .querySelector("button[value=no]")
      .addEventListener("click", () => byId("sign-in").close());
    this.#show();
  }

  get maySteer() {
    return Boolean(token());
  }

  signIn(why) {
    const dialog = byId("sign-in");
    if (dialog.open) return;
    setText(byId("sign-in-message"), why ?? "");
    dialog.showModal();
    byId("token").focus();
  }

  signOut() {
    keepToken(null);
    this.#show();
    this.onSignIn();
  }

  /** Sends a command. Returns the response, or null if it failed; then `onFailed(text, status)` has shown why. */
  async send(method, path, body, onFailed = (text) => notify(text, true)) {
    if (!this.maySteer) {
      this.signIn();
      return null;
    }
    try {
      const done = await call(method, path, body);
      if (done?.status) this.store.set("status", done.status);
      if (done?.text) notify(done.text);
      return done ?? {};
    } catch (error) {
      if (!(error instanceof RequestFailed)) throw error;
      if (error.status === 401) {
        keepToken(null);
        this.#show();
        this.signIn("Control rejects this token. Does it belong to another run?");
      } else onFailed(error.message, error.status);
      return null;
    }
  }

  /** Tests the token before it is kept. */
  async #typed(event) {
    event.preventDefault();
    const value = byId("token").value.trim();
    try {
      await call("GET", "auth", undefined, value);
    } catch (error) {
      if (!(error instanceof RequestFailed)) throw error;
      return setText(
        byId("sign-in-message"),
        error.status === 401 ? "This is not the run's token." : `${error.message}. Try again.`,
      );
    }
    keepToken(value);
    byId("token").value = "";
    byId("sign-in").close();
    this.#show();
    return this.onSignIn();
  }

  #show() {
    document.body.classList.toggle("signed-out", !this.maySteer);
    setText(byId("sign"), this.maySteer ? "Sign out" : "Sign in");
    this.store.touch("steering");
  }
}
