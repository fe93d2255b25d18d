"""The rows of a run's `metrics.jsonl`, as a report reads them."""

from typing import Any

Row = dict[str, Any]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
