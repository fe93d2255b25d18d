"""Checks what a task's `reward` or `rollout` returned."""

import math
import numbers
import reprlib
from typing import Any

from headrace.common.tasks import Outcome
from headrace.common.wire.rollout_checks import metrics_problem
from headrace.common.wire.structs import MAX_METRICS


def outcome_of(given: Any) -> Outcome:
    """The reward as a float and the metrics as floats. Raises `ValueError` if they are not finite numbers."""
    value, metrics = (given.reward, given.metrics) if isinstance(given, Outcome) else (given, {})
    reward = _finite_number(value)
    if reward is None:
        raise ValueError(f"expected a finite number for a reward, got {reprlib.repr(given)}")
    if not isinstance(metrics, dict) or len(metrics) > MAX_METRICS:
        shown = f"{len(metrics)} of them" if isinstance(metrics, dict) else type(metrics).__name__
        raise ValueError(f"expected metrics as a dict of at most {MAX_METRICS} numbers, got {shown}")
    found: dict[str, float] = {}
    for name, one in metrics.items():
        number = _finite_number(one)
        if number is None:
            raise ValueError(f"expected a finite number for the metric {name!r}, got {reprlib.repr(one)}")
        found[str(name)] = number
    if problem := metrics_problem(found):
        raise ValueError(problem)
    return Outcome(reward, found)


def _finite_number(given: Any) -> float | None:
    """The value as a float, None if it is not a finite number; numpy's and torch's scalars and booleans count."""
    if not isinstance(given, numbers.Real) and hasattr(given, "item"):
        given = given.item()
    return float(given) if isinstance(given, numbers.Real) and math.isfinite(given) else None
