/* Colours of tokens: by log-probability gap, surprise, advantage or weight version. A colour is a CSS class, so the style
   sheet decides about light and dark. Blue and orange are distinguishable for colour-blind readers. */

import { number, signed } from "./format.js";

const STEPS = 4;
const VERSIONS = 6;

/** `of(rollout, i)`: the number of token i. `has(rollout)`: whether the rollout has such numbers. */
export const TONES = [
  {
    name: "gap",
    label: "log-probability gap",
    of: (r, i) => r.proximal_logprobs[i] - r.behaviour_logprobs[i],
    has: (r) => r.proximal_logprobs !== null,
    missing: "measured for trained groups only",
  },
  { name: "surprise", label: "surprise", of: (r, i) => -r.behaviour_logprobs[i], has: () => true },
  {
    name: "advantage",
    label: "advantage",
    of: (r) => r.advantage,
    has: (r) => r.advantage !== null,
    missing: "only trained groups have one",
  },
  { name: "version", label: "weight version", of: (r, i) => r.weight_versions[i], has: () => true },
];

/** `classOf` gives the class of a token; `legend` has entries of a class and its text. */
export function toneOf(tone, rollouts) {
  const values = rollouts.filter(tone.has).flatMap((rollout) => rollout.tokens.map((_, i) => tone.of(rollout, i)));
  if (tone.name === "version") return byVersion(tone, values);
  if (tone.name === "surprise") return bySize(tone, values);
  return bySign(tone, values);
}

function bySign(tone, values) {
  const scale = quantile(values.map(Math.abs), 0.98) || 1;
  const place = (value) => Math.round(STEPS * Math.max(-1, Math.min(1, value / scale)));
  const ends = tone.name === "gap" ? ["less likely for the learner", "more likely"] : ["worse than its group", "better"];
  const legend = [-4, -2, 0, 2, 4].map((at) => ({
    tone: signTone(at),
    text: at ? signed((at / STEPS) * scale, decimals(scale)) : "0",
  }));
  legend[0].text += ` ${ends[0]}`;
  legend[4].text += ` ${ends[1]}`;
  return { classOf: (rollout, i) => (tone.has(rollout) ? signTone(place(tone.of(rollout, i))) : ""), legend };
}

function bySize(tone, values) {
  const scale = Math.max(0.5, quantile(values, 0.98));
  const place = (value) => Math.round(STEPS * Math.max(0, Math.min(1, value / scale)));
  const legend = [0, 1, 2, 3, 4].map((at) => ({ tone: `t-p${at}`, text: number((at / STEPS) * scale, 2) }));
  legend[0].text += " nats: expected";
  legend[4].text += " and more: a surprise";
  return { classOf: (rollout, i) => `t-p${place(tone.of(rollout, i))}`, legend };
}

function byVersion(tone, values) {
  const versions = [...new Set(values)].sort((a, b) => a - b);
  const places = new Map(versions.map((version, i) => [version, `t-v${i % VERSIONS}`]));
  const legend = versions.map((version) => ({ tone: places.get(version), text: `v${version}` }));
  return { classOf: (rollout, i) => places.get(rollout.weight_versions[i]), legend: legend.slice(-12) };
}

const signTone = (place) => (place < 0 ? `t-n${-place}` : `t-p${place}`);
const decimals = (scale) => Math.max(0, Math.min(8, 1 - Math.floor(Math.log10(scale))));

function quantile(values, share) {
  if (!values.length) return 0;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}
