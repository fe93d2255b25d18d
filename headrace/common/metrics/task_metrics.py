"""What a task measured besides the reward, as numbers of a row. Pure."""

from collections.abc import Iterable, Mapping

MAX_NAMES = 64
"""A task that makes up a name for every rollout must not fill the history."""


def mean_metrics(measured: Iterable[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """The mean of each metric, as `prefix/name`, over the rollouts that have it; `measured`: of each rollout. Of more
    than `MAX_NAMES` the first by alphabet."""
    values: dict[str, list[float]] = {}
    for metrics in measured:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    return {f"{prefix}/{name}": sum(values[name]) / len(values[name]) for name in sorted(values)[:MAX_NAMES]}
