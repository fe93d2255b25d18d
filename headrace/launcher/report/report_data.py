"""What a report says, from a run's rows, configuration and log lines: pure."""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from headrace.common.config import RunConfig
from headrace.common.metrics.thresholds import SMOOTHED_STEPS, THRESHOLDS, Threshold, numeric_gap
from headrace.common.process.logs import Line
from headrace.common.process.redaction import without_password
from headrace.launcher.report.curves import Series
from headrace.launcher.terminal.render import number

Row = dict[str, Any]
MAX_INCIDENTS = 60
NUMBERS = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Panel(NamedTuple):
    title: str
    series: list[Series]
    is_share: bool = False


class Setting(NamedTuple):
    name: str
    value: str
    default: Any
    is_default: bool


class UnhealthySpan(NamedTuple):
    """A stretch of steps in which a number was not well."""

    threshold: Threshold
    first_step: int
    last_step: int
    worst: float
    is_alarm: bool


@dataclass
class Incident:
    """Warnings and errors of one service that differ in their numbers only."""

    level: str
    service: str
    text: str
    first_at: float
    last_at: float
    count: int = 1


def panels(rows: Sequence[Row]) -> list[Panel]:
    steps = [row for row in rows if row.get("kind") == "step"]

    def line(name: str, label: str) -> Series:
        return Series(label, [(row["step"], row[name]) for row in steps if _is_number(row.get(name))])

    evaluations = [row for row in rows if row.get("kind") == "evaluation" and _is_number(row.get("held_out"))]
    held_out = [(row["step"], row["held_out"]) for row in evaluations]
    return [
        Panel(
            "Reward and held-out accuracy", [line("reward_mean", "reward"), Series("held-out", held_out, True)], True
        ),
        Panel("Staleness, steps", [line("staleness_mean", "mean"), line("staleness_max", "max")]),
        Panel("KL(behaviour ‖ proximal)", [line("kl_behaviour_proximal", "KL")]),
        Panel("Effective sample size", [line("ess", "share of the tokens")], True),
        Panel(
            "Engine against learner, nats (RMS)",
            [line("fresh_logprob_gap_rms", "fresh tokens"), line("stale_logprob_gap_rms", "stale tokens")],
        ),
        Panel("Shares of groups", [line("uniform_share", "uniform"), line("stale_share", "stale")], True),
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
    known = [row for row in steps if _is_number(row.get("generated_tokens")) and _is_number(row.get("wall_s"))]
    return [
        (later["step"], (later["generated_tokens"] - row["generated_tokens"]) / (later["wall_s"] - row["wall_s"]))
        for row, later in pairwise(known)
        if later["wall_s"] > row["wall_s"]
    ]


def unhealthy_spans(rows: Sequence[Row], is_exact: bool) -> list[UnhealthySpan]:
    """By the thresholds of the live verdict, on medians of the last steps; in the order of their beginnings."""
    found = [span for one in (*THRESHOLDS, numeric_gap(is_exact)) for span in _unhealthy_spans(rows, one)]
    skipped = Threshold("skipped_updates", 0.0, 1e9, "updates were skipped: not finite", "lower optimizer.lr")
    return sorted([*found, *_unhealthy_spans(rows, skipped, 1)], key=lambda span: span.first_step)


def _unhealthy_spans(
    rows: Sequence[Row], threshold: Threshold, smoothed: int = SMOOTHED_STEPS
) -> Iterator[UnhealthySpan]:
    sign, name = -1 if threshold.is_floor else 1, threshold.name
    known = [row for row in rows if row.get("kind") == "step" and _is_number(row.get(name))]
    values = [row[name] if math.isfinite(row[name]) else sign * math.inf for row in known]
    current: UnhealthySpan | None = None
    for index, row in enumerate(known):
        recent = sorted(values[max(0, index - smoothed + 1) : index + 1])
        middle = recent[len(recent) // 2]
        if sign * middle <= sign * threshold.warn:
            yield from [current] if current else []
            current = None
            continue
        is_alarm = sign * middle > sign * threshold.alarm
        begun = current or UnhealthySpan(threshold, row["step"], row["step"], middle, is_alarm)
        worst = sign * max(sign * begun.worst, sign * middle)
        current = begun._replace(last_step=row["step"], worst=worst, is_alarm=begun.is_alarm or is_alarm)
    yield from [current] if current else []


def incidents(lines: Iterable[Line]) -> tuple[list[Incident], int]:
    """What services warned of, the earliest first, and how many kinds were left out."""
    found: dict[tuple[str, str, str], Incident] = {}
    for line in lines:
        if line.level not in ("WARNING", "ERROR", "CRITICAL"):
            continue
        service = line.fields.get("replica") or line.service
        known = found.setdefault(
            (line.level, service, NUMBERS.sub("#", line.message)[:200]),
            Incident(line.level, service, line.message, line.at, line.at, 0),
        )
        known.last_at, known.count = line.at, known.count + 1
    ranked = sorted(found.values(), key=lambda one: (one.level == "WARNING", -one.count))
    return sorted(ranked[:MAX_INCIDENTS], key=lambda one: one.first_at), max(0, len(ranked) - MAX_INCIDENTS)


def settings(config: dict[str, Any]) -> list[Setting]:
    """Every setting as it was resolved, by its dotted name."""
    return list(_settings(config, RunConfig, ""))


def _settings(given: dict[str, Any], section: type[BaseModel] | None, prefix: str) -> Iterator[Setting]:
    for key, value in given.items():
        field = section.model_fields.get(key) if section else None
        inner = field.annotation if field else None
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _settings(value, inner, f"{prefix}{key}.")
            continue
        default = field.get_default(call_default_factory=True) if field else PydanticUndefined
        has_default = default is not PydanticUndefined
        yield Setting(
            f"{prefix}{key}",
            without_password(str(value)),
            default if has_default else None,
            has_default and value == default,
        )


def headline(rows: Sequence[Row], num_steps: int | None, summary: Row | None) -> list[tuple[str, str]]:
    """The run in a few numbers."""
    steps = [row for row in rows if row.get("kind") == "step"]
    evaluations = [row["held_out"] for row in rows if row.get("kind") == "evaluation" and row.get("held_out")]
    if not steps:
        return [("steps", "none yet")]
    last = steps[-1]
    wall_s = last.get("wall_s") or 0.0
    tokens = last.get("generated_tokens") or 0
    pauses_ms = [pause for row in steps for pause in row.get("swap_pauses_ms", [])]
    staleness = [row["staleness_mean"] for row in steps if _is_number(row.get("staleness_mean"))]
    found = [("steps", f"{last['step']}" + (f" of {num_steps}" if num_steps else ""))]
    if evaluations:
        found.append(("held-out", f"{evaluations[0]:.3f} → {evaluations[-1]:.3f}"))
    found += [("reward", number(last.get("reward_mean"), 3)), ("hours", f"{wall_s / 3600:.2f}")]
    found.append(("tokens/s", f"{tokens / wall_s:,.0f}" if wall_s else "–"))
    if staleness:
        found.append(("staleness", f"{statistics.fmean(staleness):.2f}"))
    if pauses_ms:
        found.append(("weight pause", f"{statistics.median(pauses_ms):.0f} ms"))
    if summary is not None and "groups" in summary:
        found.append(("groups trained", f"{summary['groups'].get('trained', 0):,}"))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
