/* An episode as a conversation: a block for each turn, and a rule where a segment begins. */

import { el } from "./dom.js";
import { plural, shortTime } from "./format.js";
import { callText, callsIn } from "./tool_calls.js";

const FIRST_TURNS = 40;
const ORIGINS = {
  conversation: "new conversation",
  history: "history rewritten by the agent",
  template: "earlier text dropped by the template",
  tools: "other tools offered",
};

/** `addTokens(start, end, label)` gives the elements of a reply's tokens. */
export function conversation(group, rollout, name, addTokens) {
  const { turns, num_omitted_turns: omitted } = rollout;
  const list = el("div", { class: "turns" });
  const add = (from, to) => {
    for (let i = from; i < to; i++) {
      if (i === 0 || turns[i].segment !== turns[i - 1].segment) list.append(...opening(group, rollout.segments[turns[i].segment], i > 0));
      list.append(turnBlock(rollout, turns[i], `Tokens of ${name.toLowerCase()}, turn ${i + 1}`, addTokens));
    }
  };
  add(0, Math.min(FIRST_TURNS, turns.length));
  const left = turns.length - FIRST_TURNS;
  const more = el("button", { type: "button", class: "quiet", onclick: rest }, `The other ${plural(left, "turn")}`);
  function rest() {
    add(FIRST_TURNS, turns.length);
    more.remove();
    list.children[FIRST_TURNS].querySelector("[tabindex]")?.focus();
  }
  return [
    list,
    left > 0 ? more : null,
    omitted ? el("p", { class: "muted" }, `${plural(omitted, "turn")} more, omitted because of their size.`) : null,
  ];
}

function opening(group, segment, isRuled) {
  const rule = el("p", { class: "segment-rule", role: "separator" }, el("span", {}, ORIGINS[segment.origin] ?? segment.origin));
  const prompt = segment.prompt ? group.prompts[segment.prompt - 1] : "";
  const block = el("div", { class: "turn" }, el("p", { class: "turn-head" }, el("b", {}, "prompt")), said("prompt", prompt));
  return [isRuled ? rule : null, prompt ? block : null].filter(Boolean);
}

/** What was not sampled. */
const said = (role, text) => el("p", { class: "said text", tabindex: "0", role: "group", "aria-label": `Text of ${role}` }, edgesVisible(text));

function turnBlock(rollout, turn, label, addTokens) {
  const isReply = turn.role === "assistant";
  const head = el(
    "p",
    { class: "turn-head" },
    el("b", {}, turn.role),
    el("span", { class: "unit" }, ` ${(isReply ? replyFacts(rollout, turn) : [`${lasted(turn)} in the environment`]).join(" · ")}`),
  );
  if (!isReply) return el("div", { class: "turn" }, head, said(turn.role, turn.text));
  const calls = callsIn(rollout.tokens.slice(turn.start, turn.end).join(""));
  return el("div", { class: "turn reply" }, head, ...addTokens(turn.start, turn.end, label), ...calls.map(callLine));
}

export const callLine = (call) => el("p", { class: "call" }, el("span", { class: "muted" }, "calls "), el("code", {}, callText(call)));

function replyFacts(rollout, turn) {
  const versions = rollout.weight_versions.slice(turn.start, turn.end);
  const oldest = Math.min(...new Set(versions)),
    newest = Math.max(...new Set(versions));
  return [
    `${lasted(turn)} in the model`,
    plural(turn.end - turn.start, "token"),
    oldest === newest ? `v${oldest}` : `v${oldest} to v${newest}`,
    turn.cached_tokens ? `${plural(turn.cached_tokens, "token")} of context cached` : null,
  ].filter(Boolean);
}

/** Line ends at both edges as signs, which take no line of their own. */
const edgesVisible = (text) => text.replace(/^\n+|\n+$/g, (ends) => "⏎".repeat(ends.length));

const lasted = (turn) => shortTime(turn.ended_at - turn.began_at);
