"""The run's results for people: rows of metrics, a summary, a plot of the learning curve.

`metrics.jsonl` has one row per step and one per evaluation; everything else here is computed from it. A resumed
learner drops the rows of steps that it will repeat. It writes the remaining rows to a new file of that name, so that
a fenced learner, which still has the old file open, cannot add to it. A learner that is fenced while it starts cannot
replace its successor's file.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends rows and flushes each, so that a reader sees whole lines."""

    def __init__(self, path: Path, step: int, epoch: int = 0, check_fence: Callable[[], None] = lambda: None) -> None:
        """Keeps the rows up to `step`. `epoch`: of the learner that will write; `check_fence` is called just before
        the file is replaced and may raise."""
        self.path = path
        aside = path.with_suffix(f".aside-{epoch:06d}")
        for left in path.parent.glob(f"{path.stem}.aside-*"):
            if left.name < aside.name:  # an earlier learner, which has checked its fence, cannot replace the file now
                left.unlink(missing_ok=True)
        self.rows = [row for row in read_rows(path) if row["step"] <= step]
        self._file = aside.open("w", buffering=1)
        for row in self.rows:
            self._file.write(json.dumps(row) + "\n")
        check_fence()
        try:
            aside.replace(path)
        except FileNotFoundError:
            check_fence()
            raise

    def append(self, row: Row) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def summarise(rows: Sequence[Row], counts: Mapping[str, int], generation_lag: float) -> dict[str, Any]:
    """The run's summary. `wall_s` is from the first ticket to the last step. `generation_lag`: the share of their time
    that replicas had no ticket; the learner's lag is the share of its time that it waited for groups."""
    steps = [row for row in rows if row["kind"] == "step"]
    wall_s = steps[-1]["wall_s"] if steps else 0.0
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    best = [{"step": row["step"], "held_out": row["held_out"]} for row in evaluations if row.get("is_best")]
    pauses_ms = [pause for row in rows for pause in row.get("swap_pauses_ms", [])]
    return {
        "held_out_before": evaluations[0]["held_out"] if evaluations else None,
        "held_out_after": evaluations[-1]["held_out"] if evaluations else None,
        "best": best[-1] if best else None,
        "held_out_completions": evaluations[-1]["num_completions"] if evaluations else 0,
        "steps": len(steps),
        "wall_s": round(wall_s, 2),
        "groups": {state: counts.get(state, 0) for state in ("trained", "uniform", "stale", "dead", "evaluated")},
        "weight_pause_ms": {"p50": percentile(pauses_ms, 0.5), "p95": percentile(pauses_ms, 0.95)},
        "tokens_per_s": round((steps[-1]["run_generated_tokens"] if steps else 0) / max(wall_s, 1e-9), 1),
        "trained_tokens_per_s": round(sum(row.get("batch_tokens", 0.0) for row in steps) / max(wall_s, 1e-9), 1),
        "staleness": {
            "mean": sum(row["staleness_mean"] for row in steps) / max(1, len(steps)),
            "max": max((row["staleness_max"] for row in steps), default=0),
        },
        "lag": {
            "generation": round(generation_lag, 4),
            "learner": round(sum(row["wait_s"] for row in steps) / max(wall_s, 1e-9), 4),
        },
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The quantile `share`, interpolated linearly between the two nearest ranks; 0 for no values."""
    return float(np.quantile(values, share)) if values else 0.0


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Plots the reward of all sampled completions and the held-out accuracy over steps, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        [r["step"] for r in steps],
        [r.get("sampled_reward_mean") for r in steps],
        alpha=0.45,
        label="reward of sampled completions",
    )
    axes.plot(
        [r["step"] for r in evaluations], [r["held_out"] for r in evaluations], marker="o", label="held-out pass@1"
    )
    axes.set(xlabel="step", ylabel="reward", ylim=(0, 1), title="Reward and held-out accuracy")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def read_rows(path: Path) -> list[Row]:
    """The rows of the file, without incomplete lines: a killed writer may have left half a line."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
