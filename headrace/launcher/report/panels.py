"""The panels of a report, each a set of columns drawn together. Pure."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from headrace.launcher.report.curves import Series
from headrace.launcher.report.rows import Row, is_number


class Panel(NamedTuple):
    title: str
    series: list[Series]
    is_share: bool = False


def panels(rows: Sequence[Row]) -> list[Panel]:
    steps = [row for row in rows if row.get("kind") == "step"]

    def line(name: str, label: str) -> Series:
        return Series(label, [(row["step"], row[name]) for row in steps if is_number(row.get(name))])

    evaluations = [row for row in rows if row.get("kind") == "evaluation" and is_number(row.get("held_out"))]
    held_out = [(row["step"], row["held_out"]) for row in evaluations]
    return [
        Panel(
            "Reward and held-out accuracy",
            [line("sampled_reward_mean", "reward"), Series("held-out", held_out, True)],
            True,
        ),
        Panel("Staleness, steps", [line("staleness_mean", "mean"), line("staleness_max", "max")]),
        Panel("KL(behaviour ‖ proximal)", [line("kl_behaviour_proximal", "KL")]),
        Panel("Effective sample size", [line("ess", "share of the tokens")], True),
        Panel(
            "Engine against learner, nats (RMS)",
            [line("fresh_logprob_gap_rms", "fresh tokens"), line("stale_logprob_gap_rms", "stale tokens")],
        ),
        Panel("Shares of groups", [line("run_uniform_share", "uniform"), line("run_stale_share", "stale")], True),
        Panel(
            "Dropped as stale or refused, lately",
            [line("dropped_share", "share of groups"), line("dropped_length_bias", "trained are shorter by")],
            True,
        ),
        Panel("Seconds of a step", [line("step_s", "whole step"), line("wait_s", "waiting for groups")]),
        Panel("Tokens per second", [Series("generated", _rates(steps))]),
        Panel(
            "Tokens of a completion",
            [
                line("completion_tokens_mean", "trained, mean"),
                line("completion_tokens_max", "trained, max"),
                line("dropped_completion_tokens_mean", "dropped, mean"),
            ],
        ),
        Panel(
            "Reward of what was trained, and dropped",
            [line("trained_reward_mean", "trained"), line("dropped_reward_mean", "dropped")],
        ),
        Panel("Entropy, nats per trained token", [line("entropy", "entropy")]),
        Panel("Gradient norm", [line("gradient_norm", "norm")]),
        Panel("Loss", [line("loss", "loss")]),
        Panel("Clipped tokens", [line("clip_fraction", "share")], True),
        Panel("Learning rate", [line("lr", "rate")]),
    ]


def _rates(steps: Sequence[Row]) -> list[tuple[float, float]]:
    known = [row for row in steps if is_number(row.get("run_generated_tokens")) and is_number(row.get("wall_s"))]
    return [
        (
            later["step"],
            (later["run_generated_tokens"] - row["run_generated_tokens"]) / (later["wall_s"] - row["wall_s"]),
        )
        for row, later in pairwise(known)
        if later["wall_s"] > row["wall_s"]
    ]
