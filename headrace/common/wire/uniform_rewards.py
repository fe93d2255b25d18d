"""Whether rewards differ at all: one rule for dynamic sampling, advantages and so the share of uniform groups."""

from typing import Any

RELATIVE, ABSOLUTE = 1e-6, 1e-12
"""What counts as rounding: of float32 arithmetic, relative to the rewards, and of float64's about 0. Learning loses
nothing by it: a standard deviation is divided by with 1e-5 added."""


def are_equal_rewards(lowest: Any, highest: Any) -> Any:
    """Whether the least and the greatest of some rewards differ by rounding alone; floats, or tensors one by one."""
    return highest - lowest <= (abs(lowest) + abs(highest)) * (RELATIVE / 2) + ABSOLUTE
