"""The table of `benchmarks.engine.swap_modes`, from its rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def report(rows: list[Row], console: Console) -> None:
    table = Table(title="Swaps in flight, by mode")
    columns: dict[str, Callable[[list[Row], float], str]] = {
        "tokens / engine s": lambda r, _: f"{rate(r):.0f}",
        "lost": lambda r, alone: f"{1 - rate(r) / alone:.0%}",
        "versions": lambda r, _: str(sum(row["num_swaps"] for row in r)),
        "recomputed / version": lambda r, _: per_version(r, "num_recomputed"),
        "pause ms p50 / p95": lambda r, _: percentiles([pause for row in r for pause in row["pauses_ms"]]),
        "confirm ms p50 / p95": lambda r, _: percentiles([time_ms for row in r for time_ms in row["confirm_ms"]]),
        "|gap| mean / max, lr 1e-3": lambda r, _: told_gap(r, 1e-3),
        "lr 1e-4": lambda r, _: told_gap(r, 1e-4),
    }
    for name in ("completions", "mode", *columns):
        table.add_column(name, justify="right")
    for shape, mode in dict.fromkeys((row["shape"], row["mode"]) for row in rows):
        chosen = [row for row in rows if (row["shape"], row["mode"]) == (shape, mode)]
        alone = [row for row in rows if (row["shape"], row["mode"]) == (shape, "no swaps")]
        table.add_row(shape, mode, *(cell(chosen, rate(alone)) for cell in columns.values()))
    console.print(table)


def rate(rows: list[Row]) -> float:
    return float(sum(row["num_tokens"] for row in rows) / sum(row["engine_s"] for row in rows))


def per_version(rows: list[Row], name: str) -> str:
    return f"{sum(row[name] for row in rows) / max(1, sum(row['num_swaps'] for row in rows)):,.0f}"


def percentiles(values: list[float]) -> str:
    return f"{np.percentile(values, 50):.0f} / {np.percentile(values, 95):.0f}" if values else "-"


def told_gap(rows: list[Row], lr: float) -> str:
    rows = [row for row in rows if row["lr"] == lr and row["num_compared"]]
    if not rows:
        return "-"
    return f"{np.mean([row['gap_mean'] for row in rows]):.1e} / {max(row['gap_max'] for row in rows):.1e}"
