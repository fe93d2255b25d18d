"""Headrace beside its peers on the same cores, in one run: `python -m benchmarks.compare [part ...]`.

Each part runs both sides in turn, `--repeats` times, and prints ratios with their spread. What was measured is written
to benchmarks/results/compare.json, where a part replaces what it had measured before.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare import generation, paced, startup, streams, synchronous, trl
from benchmarks.compare.part import Part
from benchmarks.demo import RESULTS, this_machine

PARTS: dict[str, Callable[[int], Part]] = {
    "trl": partial(trl.compare, trl.SHORT),
    "trl-heavy-tail": partial(trl.compare, trl.LONG),
    "synchronous": synchronous.measure,
    "streams": streams.measure,
    "paced": paced.measure,
    "generation": generation.measure,
    "startup": startup.measure,
}
WHERE = RESULTS / "compare.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="part", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for name in arguments.parts:
        part = PARTS[name](arguments.repeats)
        keep(name, part)
        Console().print(table(name, part))


def keep(name: str, part: Part) -> None:
    found: dict[str, Any] = json.loads(WHERE.read_text()) if WHERE.exists() else {}
    ratios = [ratio._asdict() | {"median": ratio.median} for ratio in part.ratios]
    found[name] = {"machine": this_machine(), "ratios": ratios, "rows": part.rows}
    WHERE.write_text(json.dumps(found, indent=1) + "\n")


def table(name: str, part: Part) -> Table:
    shown = Table("ratio", "median", "lowest", "highest", "goal", "reached", title=name)
    for ratio in part.ratios:
        figures = (ratio.median, min(ratio.values), max(ratio.values))
        goal = f"{'at most' if ratio.is_ceiling else 'at least'} {ratio.goal:g}"
        shown.add_row(ratio.name, *(f"{value:.3g}" for value in figures), goal, "yes" if ratio.is_reached else "no")
    return shown


if __name__ == "__main__":
    main()
