/* Sampled tokens in colours; the pointer and the arrow keys select the token whose numbers are shown. */

import { el, setText } from "./dom.js";
import { NONE, count, number, signed } from "./format.js";

const FIRST_TOKENS = 3000;

/** The tokens [start, end) of a rollout. */
export class TokenBox {
  /** `numbers`: the element that shows the numbers of the selected token. */
  constructor(rollout, start, end, label, numbers) {
    Object.assign(this, { rollout, start, end, numbers });
    this.at = -1;
    this.box = el("p", { class: "tokens", tabindex: "0", role: "listbox", "aria-orientation": "horizontal", "aria-label": label });
    const left = end - start - FIRST_TOKENS;
    this.more =
      left > 0
        ? el("button", { type: "button", class: "quiet", onclick: () => this.#rest() }, `The other ${count(left)} tokens`)
        : null;
    this.#add(Math.min(end, start + FIRST_TOKENS));
    this.box.addEventListener("pointerover", (event) => this.#showNumbers(this.#indexOf(event.target)));
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("focus", () => this.#go(Math.max(0, this.at)));
    this.box.addEventListener("blur", () => this.#unmark(this.box.children[this.at]));
  }

  get elements() {
    return [this.box, this.more];
  }

  colour(classOf) {
    this.classOf = classOf;
    [...this.box.children].forEach((token, i) => {
      token.className = classOf(this.rollout, this.start + i);
    });
  }

  #add(end) {
    const made = [];
    for (let i = this.start + this.box.children.length; i < end; i++)
      made.push(el("span", { role: "option", "aria-selected": "false" }, visible(this.rollout.tokens[i])));
    this.box.append(...made);
  }

  #rest() {
    this.#add(this.end);
    this.more.remove();
    this.colour(this.classOf);
    this.box.focus();
  }

  #indexOf(element) {
    return element.parentElement === this.box ? [...this.box.children].indexOf(element) : -1;
  }

  #key(event) {
    const last = this.box.children.length - 1;
    const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#go(Math.max(0, Math.min(last, to)));
  }

  #go(index) {
    const now = this.box.children[index];
    this.#unmark(this.box.children[this.at]);
    if (!now) return;
    this.at = index;
    now.id = "token-now";
    now.setAttribute("aria-selected", "true");
    now.classList.add("now");
    this.box.setAttribute("aria-activedescendant", "token-now");
    now.scrollIntoView({ block: "nearest" });
    this.#showNumbers(index);
  }

  #unmark(token) {
    if (!token) return;
    token.removeAttribute("id");
    token.setAttribute("aria-selected", "false");
    token.classList.remove("now");
    this.box.removeAttribute("aria-activedescendant");
  }

  #showNumbers(index) {
    if (index < 0) return;
    const { tokens, weight_versions: versions, behaviour_logprobs: behaviour, proximal_logprobs: proximal, advantage } = this.rollout;
    const i = this.start + index;
    const gap = proximal === null ? null : proximal[i] - behaviour[i];
    setText(
      this.numbers,
      [
        `token ${i + 1} of ${tokens.length}: ${JSON.stringify(tokens[i])}`,
        `v${versions[i]}`,
        `behaviour ${number(behaviour[i])} (p ${number(Math.exp(behaviour[i]))})`,
        `proximal ${number(proximal?.[i])}`,
        `gap ${number(gap)}`,
        `advantage ${advantage === null ? NONE : signed(advantage)}`,
      ].join("  ·  "),
    );
  }
}

/** Makes line ends visible, and gives an empty token a width. */
const visible = (text) => (text === "" ? "∅" : text.replaceAll("\r", "␍").replaceAll("\n", "⏎\n"));
