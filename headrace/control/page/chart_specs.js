/* Which charts there are, and what of a step each one draws. */

import { Chart } from "./chart.js";
import { byId } from "./dom.js";
import { count, fixed, number, percent } from "./format.js";

const column = (name) => (steps) => steps.columns[name] ?? [];
const share = {
  format: (v) => percent(v, v !== 0 && v < 0.1 ? 1 : 0),
  tick: (v) => percent(v),
  min: 0,
  unit: "% of tokens",
};

const LEARNING = [
  {
    title: "Reward and held-out accuracy",
    unit: "mean reward of what was sampled; pass@1",
    format: (v) => fixed(v, 3),
    tick: number,
    min: 0,
    max: 1,
    height: 250,
    told: 1,
    series: [
      { label: "reward", of: column("reward_mean"), color: 1, width: 1, alpha: 0.35 },
      { label: "reward, running mean", of: (steps) => running(steps.columns.reward_mean ?? []), color: 1, width: 2.25 },
      { label: "held-out pass@1", of: evaluated, color: 2, width: 1.5, isPoints: true },
    ],
  },
];

const HEALTH = [
  {
    title: "KL(behaviour ‖ proximal)",
    unit: "nats per token",
    format: (v) => number(v, 2),
    isLog: true,
    floor: 1e-6,
    check: "kl_behaviour_proximal",
    series: [{ label: "KL", of: column("kl_behaviour_proximal"), color: 1 }],
  },
  {
    title: "Effective sample size",
    unit: "share of tokens",
    format: (v) => fixed(v, 3),
    tick: number,
    max: 1,
    check: "ess",
    series: [{ label: "ESS", of: column("ess"), color: 3 }],
  },
  {
    title: "Clipped and masked",
    ...share,
    check: "clip_fraction",
    series: [
      { label: "clipped", of: column("clip_fraction"), color: 1 },
      { label: "behaviour clip", of: column("behaviour_clip_fraction"), color: 2, dash: [6, 3] },
      { label: "masked", of: column("behaviour_mask_fraction"), color: 4, dash: [2, 3] },
    ],
  },
  {
    title: "Log-probability gap",
    unit: "engine against learner, nats; fresh tokens: the same weights",
    format: (v) => number(v, 2),
    isLog: true,
    floor: 1e-9,
    check: "fresh_logprob_gap_rms",
    empty: "Nothing yet: it is measured on what is trained.",
    told: 1,
    series: [
      { label: "fresh, mean", of: column("fresh_logprob_gap_mean"), color: 4, dash: [2, 3], width: 1 },
      { label: "fresh, RMS", of: column("fresh_logprob_gap_rms"), color: 1 },
      { label: "fresh, p99.9", of: column("fresh_logprob_gap_p999"), color: 2, dash: [6, 3], width: 1 },
      { label: "stale, RMS", of: column("stale_logprob_gap_rms"), color: 3, width: 1 },
    ],
  },
  {
    title: "Entropy",
    unit: "nats per trained token",
    format: (v) => number(v, 3),
    min: 0,
    check: "entropy",
    series: [{ label: "entropy", of: column("entropy"), color: 3 }],
  },
  {
    title: "Importance ratio",
    unit: "policy to proximal",
    format: (v) => number(v, 3),
    check: "importance_ratio_max",
    series: [
      { label: "mean", of: column("importance_ratio_mean"), color: 1 },
      { label: "largest", of: column("importance_ratio_max"), color: 2, dash: [6, 3], width: 1 },
    ],
  },
  {
    title: "Gradient norm",
    unit: "before clipping",
    format: (v) => number(v, 3),
    min: 0,
    check: "gradient_norm",
    series: [{ label: "norm", of: column("gradient_norm"), color: 4 }],
  },
];

const FLOW = [
  {
    title: "Tokens per second",
    unit: "tokens/s",
    format: count,
    min: 0,
    series: [
      { label: "generated", of: generatedRate, color: 1 },
      { label: "trained", of: (steps) => ratio(steps, "trained_tokens", "step_s"), color: 2, dash: [6, 3] },
    ],
  },
  {
    title: "Staleness",
    unit: "steps",
    format: (v) => fixed(v, 2),
    tick: number,
    min: 0,
    check: "staleness_mean",
    told: 1,
    series: [
      { label: "largest", of: column("staleness_max"), color: 4, dash: [2, 3], width: 1 },
      { label: "mean", of: column("staleness_mean"), color: 3, width: 2 },
      { label: "in flight", of: column("staleness_in_flight_mean"), color: 1, width: 1 },
      { label: "in queue", of: column("staleness_in_queue_mean"), color: 2, dash: [6, 3], width: 1 },
    ],
  },
  {
    title: "Dropped as stale or refused",
    unit: "of groups, and what that does to lengths, over 20 steps",
    format: share.format,
    tick: share.tick,
    check: "dropped_length_bias",
    series: [
      { label: "groups", of: column("dropped_share"), color: 2, dash: [6, 3] },
      { label: "trained are shorter by", of: column("dropped_length_bias"), color: 1 },
    ],
  },
  {
    title: "Length of a completion",
    unit: "tokens; dropped: over 20 steps",
    format: (v) => number(v, 3),
    min: 0,
    series: [
      { label: "trained, mean", of: column("completion_tokens_mean"), color: 1 },
      { label: "dropped, mean", of: column("dropped_completion_tokens_mean"), color: 2, dash: [6, 3] },
    ],
  },
  {
    title: "Reward of what is trained",
    unit: "mean; dropped: over 20 steps",
    format: (v) => fixed(v, 3),
    tick: number,
    series: [
      { label: "trained", of: column("trained_reward_mean"), color: 1 },
      { label: "dropped", of: column("dropped_reward_mean"), color: 2, dash: [6, 3] },
    ],
  },
  {
    title: "Time of a step",
    unit: "seconds",
    format: (v) => number(v, 3),
    min: 0,
    series: [
      { label: "whole", of: column("step_s"), color: 3, width: 2 },
      { label: "waiting", of: column("wait_s"), color: 2, width: 1, fill: "30" },
      { label: "training", of: column("train_s"), color: 1, width: 1 },
      { label: "publishing", of: column("publish_s"), color: 4, dash: [2, 3], width: 1 },
    ],
  },
];

/** Draws all charts and keeps them up to date. */
export function startCharts(board) {
  const places = [
    ["charts-learning", LEARNING],
    ["charts-health", HEALTH],
    ["charts-flow", FLOW],
  ];
  const charts = places.flatMap(([id, specs]) => specs.map((spec) => new Chart(byId(id), spec)));
  const update = () => {
    for (const chart of charts) chart.update(board.get("steps"), board.get("axis"), board.get("status")?.checks);
  };
  board.on(["steps", "axis"], update);
  let known = "";
  board.on(["status"], () => {
    const thresholds = JSON.stringify(board.get("status").checks.map((one) => [one.name, one.warn, one.alarm]));
    if (thresholds !== known) update();
    known = thresholds;
  });
  for (const axis of ["step", "time"]) {
    byId(`x-${axis}`).addEventListener("click", () => {
      board.set("axis", axis);
      for (const one of ["step", "time"]) byId(`x-${one}`).setAttribute("aria-pressed", String(one === axis));
    });
  }
}

/** Mean of the latest 2 % of what is shown, five at least. */
function running(values) {
  const width = Math.max(5, Math.round(values.length / 50));
  const means = [];
  let sum = 0,
    number = 0;
  values.forEach((value, i) => {
    if (value !== null) {
      sum += value;
      number += 1;
    }
    const left = values[i - width];
    if (i >= width && left !== null) {
      sum -= left;
      number -= 1;
    }
    means.push(number ? sum / number : null);
  });
  return means;
}

/** Held-out accuracy at its steps; by time, at the time of the step it belongs to. */
function evaluated(steps, axis) {
  const { step, wall_s: wall } = steps.columns;
  const place = (at) => {
    if (axis === "step") return at;
    const i = step.findLastIndex((one) => one <= at);
    return i < 0 ? 0 : wall[i];
  };
  return { x: steps.evaluations.map((one) => place(one.step)), y: steps.evaluations.map((one) => one.held_out) };
}

/** From the running total, over ten rows, so that it does not jump with every group. */
function generatedRate(steps) {
  const { generated_tokens: total, wall_s: wall } = steps.columns;
  if (!total || !wall) return [];
  return total.map((value, i) => {
    const from = Math.max(0, i - 10),
      lasted = wall[i] - wall[from];
    return lasted > 0 && value !== null && total[from] !== null ? Math.max(0, (value - total[from]) / lasted) : null;
  });
}

function ratio(steps, top, bottom) {
  const [above, below] = [steps.columns[top], steps.columns[bottom]];
  return above && below ? above.map((value, i) => (value === null || !below[i] ? null : value / below[i])) : [];
}
