"""The problems of a run: steps beyond a threshold, and the services' warnings and errors. Pure."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.common.metrics.thresholds import SMOOTHED_STEPS, THRESHOLDS, Threshold, logprob_gap_threshold
from headrace.common.process.logs import LogLine
from headrace.launcher.report.rows import Row, is_number

MAX_INCIDENTS = 60
NUMBERS = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class UnhealthySpan(NamedTuple):
    """Consecutive steps in which a metric was beyond its threshold."""

    threshold: Threshold
    first_step: int
    last_step: int
    worst: float
    is_alarm: bool


@dataclass
class Incident:
    """Warnings or errors of one service that differ only in their numbers."""

    level: str
    service: str
    text: str
    first_at: float
    last_at: float
    count: int = 1


def unhealthy_spans(rows: Sequence[Row], is_exact: bool) -> list[UnhealthySpan]:
    """The spans found with the live verdict's thresholds, on medians of the last steps; ordered by first step."""
    found = [span for one in (*THRESHOLDS, logprob_gap_threshold(is_exact)) for span in _unhealthy_spans(rows, one)]
    skipped = Threshold("skipped_updates", 0.0, 1e9, "updates were skipped: not finite", "lower optimizer.lr")
    return sorted([*found, *_unhealthy_spans(rows, skipped, 1)], key=lambda span: span.first_step)


def _unhealthy_spans(
    rows: Sequence[Row], threshold: Threshold, smoothed: int = SMOOTHED_STEPS
) -> Iterator[UnhealthySpan]:
    sign, name = -1 if threshold.is_floor else 1, threshold.name
    known = [row for row in rows if row.get("kind") == "step" and is_number(row.get(name))]
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


def incidents(lines: Iterable[LogLine]) -> tuple[list[Incident], int]:
    """Warnings and errors, the earliest first, and how many kinds were omitted."""
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
