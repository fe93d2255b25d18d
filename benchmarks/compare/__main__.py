"""Headrace beside its peers on the same cores, in one run: `python -m benchmarks.compare [part ...]`.

Each part runs both sides in turn, `--repeats` times, and prints ratios with their spread. What was measured is written
to benchmarks/results/compare.json, where a part replaces what it had measured before.

    python -m benchmarks.compare --recipe benchmarks/gpu.yaml

runs the parts that a device makes a difference to, by another recipe than the demo's, into compare-gpu.json.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare import generation, paced, startup, streams, synchronous, trl
from benchmarks.compare.part import Part
from benchmarks.demo import RECIPE, RESULTS, this_machine

BY_RECIPE: dict[str, Callable[[str, int], Part]] = {
    "trl": lambda recipe, repeats: trl.compare(trl.short(recipe), repeats),
    "synchronous": synchronous.measure,
    "generation": generation.measure,
    "startup": startup.measure,
}
PARTS: dict[str, Callable[[int], Part]] = {
    "trl-heavy-tail": partial(trl.compare, trl.LONG),
    "streams": streams.measure,
    "paced": paced.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(BY_RECIPE | PARTS))
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    parts: dict[str, Callable[[int], Part]] = dict(PARTS if arguments.recipe == RECIPE else {})
    parts |= {name: partial(part, arguments.recipe) for name, part in BY_RECIPE.items()}
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))} by {arguments.recipe}; there are {', '.join(parts)}")
    for name in arguments.parts or parts:
        part = parts[name](arguments.repeats)
        keep(name, part, results_of(arguments.recipe))
        Console().print(table(name, part))


def results_of(recipe: str) -> Path:
    return RESULTS / ("compare.json" if recipe == RECIPE else f"compare-{Path(recipe).stem}.json")


def keep(name: str, part: Part, where: Path) -> None:
    found: dict[str, Any] = json.loads(where.read_text()) if where.exists() else {}
    ratios = [ratio._asdict() | {"median": ratio.median} for ratio in part.ratios]
    found[name] = {"machine": this_machine(), "ratios": ratios, "rows": part.rows}
    where.write_text(json.dumps(found, indent=1) + "\n")


def table(name: str, part: Part) -> Table:
    shown = Table("ratio", "median", "lowest", "highest", "goal", "reached", title=name)
    for ratio in part.ratios:
        figures = (ratio.median, min(ratio.values), max(ratio.values))
        goal = f"{'at most' if ratio.is_ceiling else 'at least'} {ratio.goal:g}"
        shown.add_row(ratio.name, *(f"{value:.3g}" for value in figures), goal, "yes" if ratio.is_reached else "no")
    return shown


if __name__ == "__main__":
    main()
