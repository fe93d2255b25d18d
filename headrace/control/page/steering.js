/* What a person orders: who may, the dialogs that ask back, and what control answered. */

import { Refused, call, keepToken, token } from "./api.js";
import { byId, el, setText } from "./dom.js";

const ANSWER_MS = 12_000;

/** Opens the dialog; true if the person confirmed. */
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

export function tell(text, isBad = false) {
  const said = el(
    "p",
    { class: isBad ? "bad" : "" },
    text,
    el("button", { class: "quiet", "aria-label": "Dismiss", onclick: () => said.remove() }, "×"),
  );
  byId("answers").append(said);
  while (byId("answers").children.length > 4) byId("answers").firstChild.remove();
  setTimeout(() => said.remove(), isBad ? 2 * ANSWER_MS : ANSWER_MS);
}

export class Steering {
  constructor(board, onSignIn) {
    this.board = board;
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
    setText(byId("sign-in-answer"), why ?? "");
    dialog.showModal();
    byId("token").focus();
  }

  signOut() {
    keepToken(null);
    this.#show();
    this.onSignIn();
  }

  /** Sends an order; the answer, or null if it was refused, which has been told by then. `onRefused(text)` tells
   * a refusal elsewhere. */
  async order(method, path, body, onRefused = (text) => tell(text, true)) {
    if (!this.maySteer) {
      this.signIn();
      return null;
    }
    try {
      const done = await call(method, path, body);
      if (done?.status) this.board.set("status", done.status);
      if (done?.text) tell(done.text);
      return done ?? {};
    } catch (refused) {
      if (!(refused instanceof Refused)) throw refused;
      if (refused.status === 401) {
        keepToken(null);
        this.#show();
        this.signIn("Control does not take this token. Is it another run's?");
      } else onRefused(refused.message, refused.status);
      return null;
    }
  }

  /** A token is tried before it is kept. */
  async #typed(event) {
    event.preventDefault();
    const value = byId("token").value.trim();
    try {
      await call("GET", "auth", undefined, value);
    } catch (refused) {
      if (!(refused instanceof Refused)) throw refused;
      return setText(
        byId("sign-in-answer"),
        refused.status === 401 ? "This is not the run's token." : `${refused.message}. Try again.`,
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
    this.board.touch("steering");
  }
}
