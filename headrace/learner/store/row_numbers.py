"""The numbers of a metrics row, as the stream `history` and the trackers have them: pure functions.

A learner that goes back to its checkpoint takes the steps behind it again and adds their rows again: of several rows of
one kind and step, the last one counts.
"""

import math
from collections.abc import Mapping
from typing import Any

Number = int | float | bool | None
_EXACT_BELOW = 1e6


def numbers_of(row: Mapping[str, Any]) -> dict[str, Number]:
    """Its scalars, to 7 digits, or to a thousandth where that is finer (unix times); what is not finite is None."""
    return {name: _rounded(value) for name, value in row.items() if isinstance(value, int | float)}


def _rounded(value: int | float) -> Number:
    if isinstance(value, int):
        return value
    if not math.isfinite(value):
        return None
    return float(f"{value:.7g}") if abs(value) < _EXACT_BELOW else round(value, 3)
