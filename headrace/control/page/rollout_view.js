/* One rollout of a group: a completion as coloured tokens, or an episode as a conversation. */

import { conversation } from "./conversation.js";
import { el } from "./dom.js";
import { NONE, number, plural, shortTime, signed } from "./format.js";
import { TokenBox } from "./token_box.js";

const ENDS = {
  length: "cut off at the token limit",
  max_turns: "ended by the limit of turns",
  max_tokens: "ended by the limit of sampled tokens",
  max_segments: "ended by the limit of segments",
  context: "ended by the limit of context",
};

/** `numbers`: the element that shows the numbers of the selected token. */
export class RolloutView {
  constructor(group, index, numbers) {
    const rollout = group.rollouts[index];
    const isEpisode = rollout.turns.length > 0;
    const name = `${isEpisode ? "Episode" : "Completion"} ${index + 1}`;
    this.boxes = [];
    const addTokens = (start, end, label) => {
      const box = new TokenBox(rollout, start, end, label, numbers);
      this.boxes.push(box);
      if (this.classOf) box.colour(this.classOf);
      return box.elements;
    };
    this.root = el(
      "section",
      { class: "completion" },
      el("h4", {}, name, el("span", { class: "unit" }, ` ${facts(rollout).join(" · ")}`)),
      ...(isEpisode ? conversation(group, rollout, name, addTokens) : completion(rollout, name, addTokens)),
    );
  }

  colour(classOf) {
    this.classOf = classOf;
    for (const box of this.boxes) box.colour(classOf);
  }
}

function completion(rollout, name, addTokens) {
  const { tokens, text } = rollout;
  return tokens.length ? addTokens(0, tokens.length, `Tokens of ${name.toLowerCase()}`) : [el("p", { class: "text" }, text || "(nothing)")];
}

function facts({ reward, advantage, finish_reason: finish, tokens, turns, metrics, failed_episodes: failed }) {
  const replies = turns.filter((turn) => turn.role === "assistant");
  const seconds = (some) => shortTime(some.reduce((sum, turn) => sum + turn.ended_at - turn.began_at, 0));
  return [
    `reward ${number(reward)}`,
    ...Object.entries(metrics).map(([name, value]) => `${name} ${number(value)}`),
    `advantage ${advantage === null ? NONE : signed(advantage)}`,
    plural(tokens.length, "token") + (turns.length ? ` in ${plural(replies.length, "reply", "replies")}` : ""),
    turns.length ? `${seconds(replies)} in the model, ${seconds(turns.filter((turn) => turn.role !== "assistant"))} in the environment` : null,
    failed ? `after ${plural(failed, "failed episode")}` : null,
    ENDS[finish],
  ].filter(Boolean);
}
