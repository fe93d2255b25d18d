/* One group: its prompt, and each completion as coloured tokens, or each episode as a conversation. Below are the numbers
   of the token under the pointer or at the position of the arrow keys. */

import { RequestFailed, get } from "./api.js";
import { callLine } from "./conversation.js";
import { byId, el, setText } from "./dom.js";
import { clock, duration, plural } from "./format.js";
import { RolloutView } from "./rollout_view.js";
import { TONES, toneOf } from "./token_colours.js";

let tone = TONES[0];
let asked = 0;

/** `isAsked`: a person has selected the group, so the page moves the focus to it. */
export async function openGroup(id, isAsked) {
  const mine = ++asked;
  const reader = byId("reader"),
    body = byId("reader-body");
  setText(byId("reader-title"), `Group ${id}`);
  reader.setAttribute("aria-busy", "true");
  try {
    const group = await get(`groups/${encodeURIComponent(id)}`);
    if (mine === asked) body.replaceChildren(...pages(group));
  } catch (error) {
    if (!(error instanceof RequestFailed)) throw error;
    if (mine === asked)
      body.replaceChildren(
        el(
          "p",
          { class: "empty" },
          error.status === 404 ? "This group is no longer kept. Control keeps only the newest groups." : error.message,
        ),
      );
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
  const legend = el("ul", { class: "legend tones", "aria-label": "Legend of the token colours" });
  const numbers = el(
    "p",
    { class: "token-numbers", role: "status" },
    "Point at a token, or focus a completion or reply and press → or ←.",
  );
  const rollouts = group.rollouts.map((_, i) => new RolloutView(group, i, numbers));
  if (!group.rollouts.some(tone.has)) tone = TONES.find((one) => one.name === "surprise");

  const choices = TONES.map((one) => {
    const missing = group.rollouts.some(one.has) ? null : one.missing;
    return el(
      "button",
      { type: "button", disabled: missing !== null, title: missing, "data-tone": one.name, onclick: () => paint(one) },
      one.label,
    );
  });
  function paint(chosen) {
    tone = chosen;
    const { classOf, legend: entries } = toneOf(tone, group.rollouts);
    for (const button of choices) button.setAttribute("aria-pressed", String(button.dataset.tone === tone.name));
    legend.replaceChildren(...entries.map((one) => el("li", {}, el("i", { class: `tone ${one.tone}` }), one.text)));
    for (const rollout of rollouts) rollout.colour(classOf);
  }
  paint(tone);
  return [
    el("p", { class: "muted" }, summary(group)),
    group.messages.length ? el("section", { class: "prompt-text", tabindex: "0", "aria-label": "Prompt" }, ...group.messages.map(message)) : null,
    el(
      "div",
      { class: "colouring" },
      el("div", { class: "choice", role: "group", "aria-label": "Colour tokens by" }, ...choices),
      legend,
    ),
    ...rollouts.map((one) => one.root),
    group.num_omitted
      ? el("p", { class: "muted" }, `${plural(group.num_omitted, unit(group))} more, omitted because of their size.`)
      : null,
    numbers,
  ].filter(Boolean);
}

function summary(group) {
  const staleness = group.staleness === null ? "" : `, staleness ${plural(group.staleness, "step")}`;
  return (
    `${group.kind === "eval" ? "Evaluation" : "Training"} group, ${group.state} in step ${group.step} at ${clock(group.decided_at)}${staleness}. ` +
    `Issued in step ${group.issued_step}, sampled by ${group.replica} in ${duration(group.sampled_at - group.leased_at)}, scored in ${duration(group.scored_at - group.sampled_at)}.`
  );
}

const unit = (group) => (group.rollouts.some((one) => one.turns.length) ? "episode" : "completion");

function message({ role, content, tool_calls: calls, ...rest }) {
  const others = Object.entries(rest)
    .map(([name, value]) => `${name}: ${asText(value)}`)
    .join("\n");
  return el(
    "div",
    { class: "message" },
    el("b", {}, asText(role ?? "prompt")),
    el("p", { class: "text" }, [contentText(content), others].filter(Boolean).join("\n")),
    ...(Array.isArray(calls) ? calls.map(callLine) : []),
  );
}

/** Of a message's content: a text, or parts. */
function contentText(content) {
  if (!Array.isArray(content)) return asText(content ?? "");
  return content.map((part) => (typeof part?.text === "string" ? part.text : asText(part))).join("\n");
}

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value));
