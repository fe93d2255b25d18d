"""The rule for equal rewards, shared by dynamic sampling, advantages and the share of uniform groups."""

from typing import Any

RELATIVE, ABSOLUTE = 1e-6, 1e-12
"""Differences up to these count as rounding: relative for float32 arithmetic, absolute for float64 around 0. Learning
loses nothing, because 1e-5 is added to the standard deviation before the division."""


def are_equal_rewards(lowest: Any, highest: Any) -> Any:
    """Whether the lowest and the highest reward differ only by rounding; floats, or tensors elementwise."""
    return highest - lowest <= (abs(lowest) + abs(highest)) * (RELATIVE / 2) + ABSOLUTE
