/* The charts of each section: title, unit, number format and series. To add a metric, add a series here: every number
   of a step's row is a column of `steps`. `check` draws the thresholds of the check with that name. */

import { column, evaluated, generatedRate, ratio, runningMean } from "./chart_series.js";
import { count, fixed, number, percent } from "./format.js";

const share = {
  format: (v) => percent(v, v !== 0 && v < 0.1 ? 1 : 0),
  tick: (v) => percent(v),
  min: 0,
  unit: "% of tokens",
};

export const LEARNING = [
  {
    title: "Reward and held-out accuracy",
    unit: "mean reward of all sampled groups; pass@1",
    format: (v) => fixed(v, 3),
    tick: number,
    min: 0,
    max: 1,
    height: 250,
    summary: 1,
    series: [
      { label: "reward", of: column("sampled_reward_mean"), color: 1, width: 1, alpha: 0.35 },
      { label: "reward, running mean", of: (steps) => runningMean(steps.columns.sampled_reward_mean ?? []), color: 1, width: 2.25 },
      { label: "held-out pass@1", of: evaluated, color: 2, width: 1.5, isPoints: true },
    ],
  },
];

export const HEALTH = [
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
    unit: "engine against learner, nats; fresh tokens: same weights",
    format: (v) => number(v, 2),
    isLog: true,
    floor: 1e-9,
    check: "fresh_logprob_gap_rms",
    empty: "No data yet. It is measured on trained groups.",
    summary: 1,
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
    series: [{ label: "entropy", of: column("entropy"), color: 3 }],
  },
  {
    title: "Importance ratio",
    unit: "policy to proximal",
    format: (v) => number(v, 3),
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
    series: [{ label: "norm", of: column("gradient_norm"), color: 4 }],
  },
];

export const PIPELINE = [
  {
    title: "Tokens per second",
    unit: "tokens/s",
    format: count,
    min: 0,
    series: [
      { label: "generated", of: generatedRate, color: 1 },
      { label: "trained", of: (steps) => ratio(steps, "batch_tokens", "step_s"), color: 2, dash: [6, 3] },
    ],
  },
  {
    title: "Staleness",
    unit: "steps",
    format: (v) => fixed(v, 2),
    tick: number,
    min: 0,
    summary: 1,
    series: [
      { label: "largest", of: column("staleness_max"), color: 4, dash: [2, 3], width: 1 },
      { label: "mean", of: column("staleness_mean"), color: 3, width: 2 },
      { label: "in flight", of: column("staleness_in_flight_mean"), color: 1, width: 1 },
      { label: "in queue", of: column("staleness_in_queue_mean"), color: 2, dash: [6, 3], width: 1 },
    ],
  },
  {
    title: "Groups dropped as stale or invalid",
    unit: "share of groups, and its effect on lengths, over 20 steps",
    format: share.format,
    tick: share.tick,
    check: "dropped_length_bias",
    series: [
      { label: "groups", of: column("dropped_share"), color: 2, dash: [6, 3] },
      { label: "trained ones are shorter by", of: column("dropped_length_bias"), color: 1 },
    ],
  },
  {
    title: "Completion length",
    unit: "tokens; dropped: over 20 steps",
    format: (v) => number(v, 3),
    min: 0,
    series: [
      { label: "trained, mean", of: column("completion_tokens_mean"), color: 1 },
      { label: "dropped, mean", of: column("dropped_completion_tokens_mean"), color: 2, dash: [6, 3] },
    ],
  },
  {
    title: "Reward of trained groups",
    unit: "mean; dropped: over 20 steps",
    format: (v) => fixed(v, 3),
    tick: number,
    series: [
      { label: "trained", of: column("trained_reward_mean"), color: 1 },
      { label: "dropped", of: column("dropped_reward_mean"), color: 2, dash: [6, 3] },
    ],
  },
  {
    title: "Step time",
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

/** Only runs of a task with several turns have their columns. */
export const EPISODES = [
  {
    title: "Turns of an episode",
    unit: "replies",
    format: (v) => fixed(v, 2),
    tick: number,
    min: 0,
    series: [
      { label: "mean", of: column("turns_mean"), color: 1, width: 2 },
      { label: "largest", of: column("turns_max"), color: 4, dash: [2, 3], width: 1 },
    ],
  },
  {
    title: "Time of an episode",
    unit: "seconds, mean",
    format: (v) => number(v, 3),
    min: 0,
    series: [
      { label: "in the model", of: column("model_s_mean"), color: 1 },
      { label: "in the environment", of: column("environment_s_mean"), color: 2, dash: [6, 3] },
    ],
  },
  {
    title: "Environment and cached tokens",
    unit: "share of tokens; of the replies' contexts",
    format: share.format,
    tick: share.tick,
    min: 0,
    max: 1,
    series: [
      { label: "said by the environment", of: column("environment_token_share"), color: 2 },
      { label: "found in the cache", of: column("prefix_cache_share"), color: 3, dash: [6, 3] },
    ],
  },
  {
    title: "Failed and rewritten episodes",
    unit: "share of episodes",
    format: share.format,
    tick: share.tick,
    min: 0,
    check: "episodes_failed_share",
    series: [
      { label: "failed", of: column("episodes_failed_share"), color: 2 },
      { label: "history rewritten", of: column("rewritten_share"), color: 4, dash: [2, 3], width: 1 },
    ],
  },
];
