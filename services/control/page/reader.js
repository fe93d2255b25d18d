/* One group, to be read: its prompt, and each completion token by token, coloured; the numbers of the token under the
   pointer, or of the one that the arrow keys are at, stand below. */

import { Refused, get } from "./api.js";
import { byId, el, setText } from "./dom.js";
import { NONE, clock, count, duration, fixed, number, plural, signed } from "./format.js";
import { TONES, toneOf } from "./tones.js";

const FIRST_TOKENS = 3000;
let tone = TONES[0];
let asked = 0;

/** `isAsked`: by a person, who is brought there. */
export async function openGroup(id, isAsked) {
  const mine = ++asked;
  const reader = byId("reader"), body = byId("reader-body");
  setText(byId("reader-title"), `Group ${id}`);
  reader.setAttribute("aria-busy", "true");
  try {
    const group = await get(`groups/${encodeURIComponent(id)}`);
    if (mine === asked) body.replaceChildren(...pages(group));
  } catch (refused) {
    if (!(refused instanceof Refused)) throw refused;
    if (mine === asked) body.replaceChildren(el("p", { class: "empty" }, refused.status === 404 ? "This group is no longer kept: only the newest are." : refused.message));
  }
  if (mine !== asked) return;
  reader.removeAttribute("aria-busy");
  reader.scrollTop = 0;
  if (!isAsked) return;
  reader.focus({ preventScroll: true });
  const box = reader.getBoundingClientRect();
  if (box.top < 0 || box.top > innerHeight * 0.6) reader.scrollIntoView({ block: "start" });
}

function pages(group) {
  const legend = el("ul", { class: "legend tones", "aria-label": "What the colours mean" });
  const numbers = el("p", { class: "token-says", role: "status" }, "Point at a token, or focus a completion and press → or ←.");
  const completions = group.rollouts.map((rollout, i) => new Completion(rollout, i, numbers));
  if (!group.rollouts.some(tone.has)) tone = TONES.find((one) => one.name === "surprise");

  const choices = TONES.map((one) => {
    const missing = group.rollouts.some(one.has) ? null : one.missing;
    return el("button", { type: "button", disabled: missing !== null, title: missing, "data-tone": one.name, onclick: () => paint(one) }, one.label);
  });
  function paint(chosen) {
    tone = chosen;
    const { classOf, legend: entries } = toneOf(tone, group.rollouts);
    for (const button of choices) button.setAttribute("aria-pressed", String(button.dataset.tone === tone.name));
    legend.replaceChildren(...entries.map((one) => el("li", {}, el("i", { class: `tone ${one.tone}` }), one.text)));
    for (const completion of completions) completion.colour(classOf);
  }
  paint(tone);
  return [
    el("p", { class: "muted" }, facts(group)),
    el("section", { class: "prompt-text", "aria-label": "Prompt" }, ...group.messages.map(message)),
    el("div", { class: "colouring" }, el("div", { class: "choice", role: "group", "aria-label": "Colour tokens by" }, ...choices), legend),
    ...completions.map((one) => one.root),
    group.num_left_out ? el("p", { class: "muted" }, `${plural(group.num_left_out, "completion")} more, left out for their size.`) : null,
    numbers,
  ].filter(Boolean);
}

function facts(group) {
  const staleness = group.staleness === null ? "" : `, staleness ${plural(group.staleness, "step")}`;
  return `${group.kind === "eval" ? "Evaluation" : "Training"} group, ${group.state} in step ${group.step} at ${clock(group.decided_at)}${staleness}. ` +
    `Issued in step ${group.issued_step}, sampled by ${group.replica} in ${duration(group.sampled_at - group.leased_at)}, scored in ${duration(group.scored_at - group.sampled_at)}.`;
}

function message({ role, content, ...rest }) {
  const others = Object.entries(rest).map(([name, value]) => `${name}: ${value}`).join("\n");
  return el("div", { class: "message" }, el("b", {}, role ?? "prompt"), el("p", { class: "text" }, [content ?? "", others].filter(Boolean).join("\n")));
}

class Completion {
  constructor(rollout, index, numbers) {
    this.rollout = rollout;
    this.numbers = numbers;
    this.at = -1;
    const { reward, advantage, finish_reason: finish, tokens } = rollout;
    this.box = el("p", { class: "tokens", tabindex: "0", role: "listbox", "aria-orientation": "horizontal", "aria-label": `Tokens of completion ${index + 1}` });
    this.more = tokens.length > FIRST_TOKENS
      ? el("button", { type: "button", class: "quiet", onclick: () => this.#rest() }, `The other ${count(tokens.length - FIRST_TOKENS)} tokens`) : null;
    const cut = finish === "length" ? ", cut at the limit" : "";
    this.root = el("section", { class: "completion" }, el("h4", {}, `Completion ${index + 1}`,
      el("span", { class: "unit" }, ` reward ${number(reward)} · advantage ${advantage === null ? NONE : signed(advantage)} · ${plural(tokens.length, "token")}${cut}`)),
      this.box, this.more);
    this.#add(0, Math.min(tokens.length, FIRST_TOKENS));
    if (!tokens.length) this.box.replaceWith(el("p", { class: "text" }, rollout.text || "(nothing)"));
    this.box.addEventListener("pointerover", (event) => this.#tell(this.#indexOf(event.target)));
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("focus", () => this.#go(Math.max(0, this.at)));
    this.box.addEventListener("blur", () => this.box.querySelector(".now")?.classList.remove("now"));
  }

  colour(classOf) {
    this.classOf = classOf;
    [...this.box.children].forEach((token, i) => { token.className = classOf(this.rollout, i); });
  }

  #add(from, to) {
    const made = [];
    for (let i = from; i < to; i++) made.push(el("span", { role: "option", "aria-selected": "false" }, visible(this.rollout.tokens[i])));
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
    const before = this.box.children[this.at], now = this.box.children[index];
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
    this.#tell(index);
  }

  #tell(i) {
    if (i < 0) return;
    const { tokens, versions, behaviour_logprobs: behaviour, proximal_logprobs: proximal, advantage } = this.rollout;
    const gap = proximal === null ? null : proximal[i] - behaviour[i];
    setText(this.numbers, [`token ${i + 1} of ${tokens.length}: ${JSON.stringify(tokens[i])}`, `v${versions[i]}`,
      `behaviour ${fixed(behaviour[i], 3)} (p ${number(Math.exp(behaviour[i]), 3)})`, `proximal ${fixed(proximal?.[i], 3)}`,
      `gap ${gap === null ? NONE : Math.abs(gap) < 5e-4 && gap !== 0 ? number(gap) : signed(gap)}`, `advantage ${advantage === null ? NONE : signed(advantage)}`].join("  ·  "));
  }
}

/** Line ends can be seen, and nothing has no width. */
const visible = (text) => (text === "" ? "∅" : text.replaceAll("\r", "␍").replaceAll("\n", "⏎\n"));
