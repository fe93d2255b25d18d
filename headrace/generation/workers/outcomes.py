"""Checks what a task's `reward` or `rollout` returned."""

import math
import numbers
import reprlib
from typing import Any

from headrace.common.tasks import Outcome
from headrace.common.wire.rollout_checks import metrics_problem
from headrace.common.wire.structs import MAX_METRICS


class NotAnOutcome(ValueError):
    """What a task returned is no reward; the text says what was expected."""


def outcome_of(given: Any) -> Outcome:
    """The reward as a float and the metrics as floats. Raises `NotAnOutcome` if they are not finite numbers."""
    value, metrics = (given.reward, given.metrics) if isinstance(given, Outcome) else (given, {})
    reward = _finite_number(value)
    if reward is None:
        raise NotAnOutcome(f"expected a finite number for a reward, got {reprlib.repr(value)}")
    if not isinstance(metrics, dict) or len(metrics) > MAX_METRICS:
        shown = f"{len(metrics)} of them" if isinstance(metrics, dict) else type(metrics).__name__
        raise NotAnOutcome(f"expected metrics as a dict of at most {MAX_METRICS} numbers, got {shown}")
    found: dict[str, float] = {}
    for name, one in metrics.items():
        number = _finite_number(one)
        if number is None:
            raise NotAnOutcome(f"expected a finite number for the metric {name!r:.100}, got {reprlib.repr(one)}")
        found[str(name)] = number
    if problem := metrics_problem(found):
        raise NotAnOutcome(problem)
    return Outcome(reward, found)


def _finite_number(given: Any) -> float | None:
    """The value as a float, None if it is not a finite number; numpy's and torch's scalars and booleans count."""
    if not isinstance(given, numbers.Real) and hasattr(given, "item"):
        given = given.item()
    return float(given) if isinstance(given, numbers.Real) and math.isfinite(given) else None
