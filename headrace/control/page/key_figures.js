/* The key figures: the dozen numbers to look at first. */

import { byId, el, keep, setText } from "./dom.js";
import { NONE, count, duration, fixed, number, percent } from "./format.js";

export function startKeyFigures(store) {
  const paint = () => {
    const status = store.get("status");
    if (status) keep(byId("figures"), figures(status, store.get("steps")), (one) => one.name, make, write);
  };
  store.on(["status", "steps"], paint);
}

function figures(status, steps) {
  const { latest_evaluation: held, rates, staleness, replicas, counts } = status;
  const best = steps.evaluations.find((one) => one.is_best);
  const finished = counts.trained + counts.uniform + counts.stale;
  return [
    {
      name: "Step",
      value: `${count(status.step)}`,
      unit: `of ${count(status.target_steps)}`,
      share: status.target_steps ? status.step / status.target_steps : 0,
      note:
        status.remaining_s === null
          ? `${duration(status.wall_s)} so far`
          : `${duration(status.remaining_s)} to go, ${duration(status.wall_s)} so far`,
    },
    { name: "Reward", value: fixed(status.sampled_reward_mean, 3), note: "mean of all sampled groups" },
    {
      name: "Held-out pass@1",
      value: fixed(held?.held_out, 3),
      note: !held
        ? "not evaluated yet"
        : best && best.step !== held.step
          ? `at step ${held.step}; best ${fixed(best.held_out, 3)} at ${best.step}`
          : `at step ${held.step}${held.is_best || best ? ", the best" : ""}`,
    },
    {
      name: "Generated",
      value: count(rates.generated_tokens_per_s),
      unit: "tokens/s",
      note: `${count(counts.generated_tokens)} tokens in all`,
    },
    {
      name: "Trained",
      value: count(rates.trained_tokens_per_s),
      unit: "tokens/s",
      note: `${number(rates.steps_per_hour)} steps/h`,
    },
    {
      name: "Staleness",
      value: fixed(staleness.mean, 2),
      unit: "steps",
      note:
        staleness.mean === null
          ? "of trained groups"
          : `${fixed(staleness.in_flight, 2)} in flight, ${fixed(staleness.in_queue, 2)} in queue; max ${number(staleness.max)}`,
    },
    {
      name: "Learner idle",
      value: percent(rates.learner_idle_share),
      note: "waiting for groups",
      share: rates.learner_idle_share,
    },
    {
      name: "Replicas idle",
      value: percent(rates.replicas_idle_share),
      note: "waiting for tickets",
      share: rates.replicas_idle_share,
    },
    {
      name: "Replicas",
      value: String(replicas.running),
      unit: `running of ${replicas.live}`,
      note: replicas.desired === null ? "no target set" : `target ${replicas.desired}`,
    },
    { name: "Weight version", value: count(status.weight_version), note: `learner start ${status.fencing_epoch}` },
    {
      name: "Uniform groups",
      value: finished ? percent(counts.uniform / finished) : NONE,
      note: `all rewards equal; ${count(counts.stale)} stale`,
    },
    {
      name: "Dead letters",
      value: count(counts.dead_letters),
      unit: counts.dead_letters === 1 ? "ticket" : "tickets",
      isBad: counts.dead_letters > 0,
      note: counts.dead_letters ? "see headrace dead-letters list" : "no ticket has failed for good",
    },
  ];
}

function make(one) {
  return el(
    "div",
    {},
    el("dt", {}, one.name),
    el("dd", {}, el("b"), el("span", { class: "unit" })),
    el("dd", { class: "note" }),
    "share" in one ? el("dd", { class: "share", "aria-hidden": "true" }, el("i")) : null,
  );
}

function write(box, one) {
  const [, value, note, share] = box.children;
  setText(value.firstChild, one.value);
  setText(value.lastChild, one.unit ? ` ${one.unit}` : "");
  setText(note, one.note);
  box.classList.toggle("bad", Boolean(one.isBad));
  if (share) share.firstChild.style.width = `${100 * Math.min(1, Math.max(0, one.share ?? 0))}%`;
}
