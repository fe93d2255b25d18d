"""Headrace and its peers on the same cores, side by side: `python -m benchmarks.compare [part ...]`.

Each part runs both sides in turn, `--repeats` times, and prints ratios with their spread. Measurements go to
benchmarks/results/compare.json, where they replace the part's earlier ones. In the comparison with TRL a repeat is a
seed, from `--first-seed` on, and takes long: each result is written as soon as it is known, and results of other seeds
with the same settings are kept.

    python -m benchmarks.compare --recipe benchmarks/compare/gpu.yaml

runs the parts that depend on the device with another recipe than the demo's, into compare-gpu.json.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.compare import generation, paced, startup, streams, synchronous, trl
from benchmarks.compare.part import Part
from benchmarks.demo import RECIPE, RESULTS, this_machine


class Asked(NamedTuple):
    recipe: str
    repeats: int
    first_seed: int
    earlier: list[dict[str, Any]]
    """The part's earlier rows."""

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.repeats)


BY_RECIPE: dict[str, Callable[[Asked], Iterable[Part]]] = {
    "trl": lambda asked: trl.compare(trl.short(asked.recipe), asked.seeds, asked.earlier),
    "synchronous": lambda asked: [synchronous.measure(asked.recipe, asked.repeats)],
    "generation": lambda asked: [generation.measure(asked.recipe, asked.repeats)],
    "startup": lambda asked: [startup.measure(asked.recipe, asked.repeats)],
}
PARTS: dict[str, Callable[[Asked], Iterable[Part]]] = {
    "trl-heavy-tail": lambda asked: trl.compare(trl.LONG, asked.seeds, asked.earlier),
    "streams": lambda asked: [streams.measure(asked.repeats)],
    "paced": lambda asked: [paced.measure(asked.repeats)],
}
"""What each part measures; it yields its results repeatedly as they grow."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(BY_RECIPE | PARTS))
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    parts = (PARTS if arguments.recipe == RECIPE else {}) | BY_RECIPE
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))} by {arguments.recipe}; there are {', '.join(parts)}")
    where = results_of(arguments.recipe)
    for name in arguments.parts or parts:
        earlier = found_in(where).get(name, {}).get("rows", [])
        for part in parts[name](Asked(arguments.recipe, arguments.repeats, arguments.first_seed, earlier)):
            keep(name, part, where)
        Console().print(table(name, part))


def results_of(recipe: str) -> Path:
    return RESULTS / ("compare.json" if recipe == RECIPE else f"compare-{Path(recipe).stem}.json")


def found_in(where: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(where.read_text()) if where.exists() else {}
    return found


def keep(name: str, part: Part, where: Path) -> None:
    found = found_in(where)
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
