"""The numbers of a metrics row, as the stream `history` and the trackers have them. Pure functions.

A learner that resumes from a checkpoint repeats the steps after it and adds their rows again: of several rows of one
kind and step, the last one counts.
"""

import math
from collections.abc import Mapping
from typing import Any

Number = int | float | bool | None
_EXACT_BELOW = 1e6


def numbers_of(row: Mapping[str, Any]) -> dict[str, Number]:
    """The row's scalars, to 7 digits, or to a thousandth where that is finer (unix times); None if not finite."""
    return {name: _rounded(value) for name, value in row.items() if isinstance(value, int | float)}


def _rounded(value: int | float) -> Number:
    if isinstance(value, int):
        return value
    if not math.isfinite(value):
        return None
    return float(f"{value:.7g}") if abs(value) < _EXACT_BELOW else round(value, 3)
