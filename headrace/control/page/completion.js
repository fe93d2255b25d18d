/* One completion as coloured tokens; the pointer and the arrow keys select the token whose numbers are shown. */

import { el, setText } from "./dom.js";
import { NONE, count, number, plural, signed } from "./format.js";

const FIRST_TOKENS = 3000;

/** `numbers`: the element that shows the numbers of the selected token. */
export class Completion {
  constructor(rollout, index, numbers) {
    this.rollout = rollout;
    this.numbers = numbers;
    this.at = -1;
    const { reward, advantage, finish_reason: finish, tokens } = rollout;
    this.box = el("p", {
      class: "tokens",
      tabindex: "0",
      role: "listbox",
      "aria-orientation": "horizontal",
      "aria-label": `Tokens of completion ${index + 1}`,
    });
    this.more =
      tokens.length > FIRST_TOKENS
        ? el(
            "button",
            { type: "button", class: "quiet", onclick: () => this.#rest() },
            `The other ${count(tokens.length - FIRST_TOKENS)} tokens`,
          )
        : null;
    const cut = finish === "length" ? ", cut off at the token limit" : "";
    this.root = el(
      "section",
      { class: "completion" },
      el(
        "h4",
        {},
        `Completion ${index + 1}`,
        el(
          "span",
          { class: "unit" },
          ` reward ${number(reward)} · advantage ${advantage === null ? NONE : signed(advantage)} · ${plural(tokens.length, "token")}${cut}`,
        ),
      ),
      this.box,
      this.more,
    );
    this.#add(0, Math.min(tokens.length, FIRST_TOKENS));
    if (!tokens.length) this.box.replaceWith(el("p", { class: "text" }, rollout.text || "(nothing)"));
    this.box.addEventListener("pointerover", (event) => this.#showNumbers(this.#indexOf(event.target)));
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("focus", () => this.#go(Math.max(0, this.at)));
    this.box.addEventListener("blur", () => this.box.querySelector(".now")?.classList.remove("now"));
  }

  colour(classOf) {
    this.classOf = classOf;
    [...this.box.children].forEach((token, i) => {
      token.className = classOf(this.rollout, i);
    });
  }

  #add(from, to) {
    const made = [];
    for (let i = from; i < to; i++)
      made.push(el("span", { role: "option", "aria-selected": "false" }, visible(this.rollout.tokens[i])));
    this.box.append(...made);
  }

  #rest() {
    this.#add(this.box.children.length, this.rollout.tokens.length);
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
    const before = this.box.children[this.at],
      now = this.box.children[index];
    if (before) {
      before.removeAttribute("id");
      before.setAttribute("aria-selected", "false");
      before.classList.remove("now");
    }
    if (!now) return;
    this.at = index;
    now.id = "token-now";
    now.setAttribute("aria-selected", "true");
    now.classList.add("now");
    this.box.setAttribute("aria-activedescendant", "token-now");
    now.scrollIntoView({ block: "nearest" });
    this.#showNumbers(index);
  }

  #showNumbers(i) {
    if (i < 0) return;
    const { tokens, weight_versions: versions, behaviour_logprobs: behaviour, proximal_logprobs: proximal, advantage } = this.rollout;
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
