"""A row of the learner as metrics: the latest step and evaluation as gauges, all steps as histograms.

Every number of a row is exported, as `headrace_` (of an evaluation `headrace_eval_`) and its name with the unit spelt
out at the end, whoever adds it; `TEXTS` says what it is. The rows in Redis' stream `history` and the learner's own have
the same numbers.
"""

import re
from collections.abc import Mapping
from typing import Any

from headrace.common.metrics.families import LONG_S, Families, Histogram

PHASES = ("wait", "proximal", "train", "publish")
TEXTS = {
    "sampled_reward_mean": "Mean reward of the batch and of what was uniform or stale since the step before.",
    "trained_reward_mean": "Mean reward of the batch.",
    "loss": "Loss, weighted as it was trained.",
    "lr": "Learning rate.",
    "gradient_norm": "Largest gradient norm of the step's updates, before clipping.",
    "skipped_updates": "Updates of the step that were skipped because their gradient was not finite.",
    "ess": "Effective sample size of the uncapped behaviour weights, as a share of the tokens.",
    "kl_behaviour_proximal": "KL(behaviour || proximal) per token.",
    "kl_at_staleness": "KL(behaviour || proximal) per token, of tokens of that staleness in steps.",
    "entropy": "Entropy of the policy at trained tokens, in nats, at the sampling temperature.",
    "importance_ratio_mean": "Mean ratio of policy to proximal.",
    "importance_ratio_max": "Largest ratio of policy to proximal.",
    "clip_fraction": "Share of tokens where the clip acted.",
    "dual_clip_fraction": "Share of tokens where the dual clip acted.",
    "behaviour_weight_mean": "Mean uncapped weight of proximal over behaviour.",
    "behaviour_weight_max": "Largest uncapped weight of proximal over behaviour.",
    "behaviour_weight_capped_mean": "Mean weight of proximal over behaviour, as it was applied.",
    "behaviour_mask_fraction": "Share of tokens whose behaviour weight was above the cap.",
    "behaviour_clip_fraction": "Share of tokens dropped because their sequence had drifted from behaviour.",
    "fresh_tokens": "Tokens of the batch, or else of a newer group, that the weights at the start of the step sampled.",
    "fresh_logprob_gap_mean": "Mean |engine - learner| log-probability of fresh tokens: numerics alone.",
    "fresh_logprob_gap_rms": "Root mean square of engine - learner log-probabilities of fresh tokens: numerics alone.",
    "fresh_logprob_gap_p999": "99.9th percentile of |engine - learner| log-probability of fresh tokens.",
    "stale_logprob_gap_rms": "Root mean square of engine - learner log-probabilities of stale tokens: drift as well.",
    "staleness_mean": "Mean staleness of the batch's groups, in steps.",
    "staleness_max": "Largest staleness of the batch's groups, in steps.",
    "staleness_in_flight_mean": "The part of the mean staleness until the group's last token was sampled, in steps.",
    "staleness_in_queue_mean": "The part of the mean staleness from then until the group was packed, in steps.",
    "token_staleness_mean": "Mean staleness of the batch's tokens, in steps.",
    "completion_tokens_mean": "Mean length of the batch's completions, in tokens.",
    "completion_tokens_max": "Largest length of the batch's completions, in tokens.",
    "truncated_share": "Share of the batch's completions that reached the limit of tokens.",
    "batch_tokens": "Tokens of the batch.",
    "multi_version_share": "Share of the batch's completions sampled by more than one weight version.",
    "num_versions": "Weight versions that sampled the batch, or the evaluation.",
    "sampling_s_mean": "Mean time from a group's lease until its last token.",
    "scoring_s_mean": "Mean time of a group's rewards.",
    "padding_share": "Share of padding in the rows of the learner's attention.",
    "turns_mean": "Mean number of replies of the batch's episodes.",
    "turns_max": "Largest number of replies of one of the batch's episodes.",
    "segments_mean": "Mean number of token sequences of the batch's episodes.",
    "split_share": "Share of the batch's episodes that are more than one token sequence.",
    "rewritten_share": "Share of the batch's episodes whose agent rewrote its history.",
    "environment_token_share": "Share of tokens, of those behind the prompts, that the environments said.",
    "finished_stop_share": "Share of the batch's episodes that ended by themselves.",
    "finished_length_share": "Share of the batch's episodes whose last reply reached max_new_tokens.",
    "finished_max_turns_share": "Share of the batch's episodes that reached environment.max_turns.",
    "finished_max_tokens_share": "Share of the batch's episodes that reached environment.max_tokens.",
    "finished_max_segments_share": "Share of the batch's episodes that reached environment.max_segments.",
    "finished_context_share": "Share of the batch's episodes that reached environment.max_context_tokens.",
    "model_s_mean": "Mean time of an episode's replies.",
    "environment_s_mean": "Mean time of an episode between its replies.",
    "prefix_cache_share": "Share of the replies' contexts, by tokens, that engines had in their prefix cache.",
    "episodes_failed_share": "Share of episodes that failed, of these and the batch's.",
    "environment": "Mean of what the task measured of the batch's rollouts, by its name.",
    "run_uniform_share": "Share of all groups so far that were uniform.",
    "skipped_prompts": "Prompts so far that were too long for the context with max_new_tokens, and not issued.",
    "run_stale_share": "Share of all groups so far that were stale.",
    "dropped_groups": "Groups dropped as stale or refused since the step before.",
    "dropped_share": "Groups dropped as stale or refused, of these and the trained ones, over the last 20 steps.",
    "dropped_completion_tokens_mean": "Mean length of the dropped groups' completions, in tokens, over 20 steps.",
    "dropped_reward_mean": "Mean reward of the dropped groups' completions, over 20 steps.",
    "dropped_length_bias": "By what share trained completions are shorter than all that were sampled, over 20 steps.",
    "run_generated_tokens": "Tokens of all groups of the run so far.",
    "wall_s": "Time since the run's first ticket, over all its lives.",
    "wait_s": "Time that the latest step waited for groups.",
    "proximal_s": "Time of the latest step's proximal log-probabilities.",
    "train_s": "Time of the latest step's updates.",
    "publish_s": "Time of the latest step's publication.",
    "sample_write_s": "Time of the latest step's sample of groups for people to read.",
    "step_s": "Time of the latest step, its wait included.",
}
"""Help texts of the numbers in a step's row."""
EVALUATION_TEXTS = {
    "held_out": "pass@1 of the latest evaluation.",
    "held_out_metric": "Mean of what the task measured in the latest evaluation, by its name.",
    "pass_at": "pass@k of the latest evaluation.",
    "first_token_step_mean": "Mean step of the weights that answered the latest evaluation.",
    "num_completions": "Completions of the latest evaluation.",
    "num_dead": "Tickets of the latest evaluation that died.",
}
_STEP_TIMES = {f"{phase}_s": f"step_{phase}_s" for phase in PHASES}
"""Metric names, by the row's name, where the row's own name would be ambiguous."""
_LABELLED = {"kl_at_staleness": "staleness", "pass_at": "k"}
"""The number at the end of the name is a label."""
_OF_THE_TASK = {"environment": "environment", "held_out": "held_out_metric"}
"""Families of the names that a task chose, which are a label, by what stands before them in the row's name."""
_SAID_ELSEWHERE = {"kind", "step", "time_s", "at", "weight_version", "is_best"}


def add_latest_step(families: Families, row: Mapping[str, Any]) -> None:
    _add(families, row, "headrace")
    families.gauge(
        "headrace_latest_step_timestamp_seconds",
        "Time at which the latest step was complete.",
        row.get("time_s", row.get("at")),
    )


def add_latest_evaluation(families: Families, row: Mapping[str, Any]) -> None:
    _add(families, row, "headrace_eval")
    families.gauge("headrace_eval_step", "Step whose weights the latest evaluation used.", row.get("step"))


def _add(families: Families, row: Mapping[str, Any], prefix: str) -> None:
    for name, value in row.items():
        if name not in _SAID_ELSEWHERE and isinstance(value, int | float):
            name, labels = _labelled(name)
            families.gauge(metric_name(name, prefix), text_of(name), float(value), **labels)


def _labelled(name: str) -> tuple[str, dict[str, str]]:
    family, separator, chosen = name.partition("/")
    if separator:
        return _OF_THE_TASK.get(family, family), {"metric": chosen}
    for family, label in _LABELLED.items():
        if number := re.fullmatch(rf"{family}_(\d+)", name):
            return family, {label: number[1]}
    return name, {}


def metric_name(name: str, prefix: str = "headrace") -> str:
    """Of a row's number: `sampling_s_mean` is `headrace_sampling_mean_seconds`, `wait_s` `headrace_step_wait_seconds`.
    The numbers of an evaluation have the prefix `headrace_eval`."""
    words = _STEP_TIMES.get(name, name).split("_")
    if "s" in words:
        words = [*(word for word in words if word != "s"), "seconds"]
    return "_".join([prefix, *words])


def text_of(name: str) -> str:
    return (TEXTS | EVALUATION_TEXTS).get(name, f"{name} of the latest step or evaluation.")


class StepTotals:
    """Sums and histograms over the steps that it was told of, each once."""

    def __init__(self) -> None:
        self.trained_tokens = 0.0
        self._phases = {phase: Histogram(LONG_S) for phase in PHASES}
        self._steps = Histogram(LONG_S)
        self._groups = Histogram(LONG_S)

    def add(self, row: Mapping[str, Any]) -> None:
        self.trained_tokens += row.get("batch_tokens") or 0.0
        for phase, histogram in self._phases.items():
            _observe(histogram, row.get(f"{phase}_s"))
        _observe(self._steps, row.get("step_s"))
        for seconds in row.get("group_durations_s") or ():
            self._groups.observe(seconds)

    def collect(self, families: Families) -> None:
        families.counter("headrace_trained_tokens_total", "Tokens that were trained.", self.trained_tokens)
        families.histogram("headrace_step_duration_seconds", "Time of a step, its wait included.", self._steps)
        for phase, histogram in self._phases.items():
            families.histogram("headrace_step_phase_seconds", "Time of a step by phase.", histogram, phase=phase)
        families.histogram(
            "headrace_group_duration_seconds", "From a trained group's lease until it was scored.", self._groups
        )


def _observe(histogram: Histogram, seconds: float | None) -> None:
    if seconds is not None:
        histogram.observe(seconds)
