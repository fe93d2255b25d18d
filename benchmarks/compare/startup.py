"""Seconds from `headrace up` with the demo's recipe to its first training step, by phase, from the logs.

Everything is installed, and the run is new. Two chains run in parallel: the learner's (imports, policy, first version)
and the replica's (imports, engine, first weights); the first group needs both. Beside its first step the demo evaluates
the initial policy with 512 completions. On few cores a phase takes longer than it would alone, because the chains
compete. There is no peer to compare with; the start of the engine alone, the same server by the same command, is the
yardstick.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.compare.part import Part, Ratio
from benchmarks.demo import headrace_up
from headrace.common.process.logs import parse_line
from headrace.launcher.run.processes import Service

DEADLINE_S = 300.0
POLL_S = 0.2
MOST_BESIDE_THE_ENGINE = 2.0
Row = dict[str, Any]


class Mark(NamedTuple):
    """A phase ends when a line with these words first appears in a log."""

    name: str
    log: str
    words: str


MARKS = (
    Mark("launcher: imports, Redis answers", "launcher", "logs in"),
    Mark("learner: imports", "learner", "libraries are imported"),
    Mark("learner: policy", "learner", "the policy is loaded"),
    Mark("learner: first version", "learner", "published, made by step 0"),
    Mark("replica: imports, joins", "generation-0", "the model to start from"),
    Mark("replica: engine begins to start", "generation-0", "starting the engine"),
    Mark("replica: engine answers", "generation-0", "the engine serves"),
    Mark("replica: first weights", "generation-0", "serving: "),
    Mark("first ticket leased", "generation-0", "leased, for version"),
    Mark("first group committed", "generation-0", "committed, sampled"),
    Mark("first evaluation", "learner", "evaluation:"),
    Mark("first step", "learner", "step: "),
)


def measure(recipe: str, repeats: int) -> Part:
    with tempfile.TemporaryDirectory(prefix="headrace-startup-") as folder:
        rows = [start(recipe, Path(folder), f"startup-{turn}") for turn in range(repeats)]
    report(rows)
    shares = [row["first ticket leased"] / row["engine_start_s"] for row in rows]
    return Part(rows, [Ratio("first ticket over the engine's own start", shares, MOST_BESIDE_THE_ENGINE, True)])


def start(recipe: str, folder: Path, run: str) -> Row:
    """Seconds from the command to each mark."""
    load, began = os.getloadavg()[0], time.time()
    service = Service("up", headrace_up(recipe, run, "--runs-folder", str(folder)), folder / f"{run}.log")
    try:
        found = wait_for_all(service, folder / run / "logs", began)
    finally:
        service.stop(60.0)
    engine_start_s = found["replica: engine answers"] - found["replica: engine begins to start"]
    return {"load_average": load, "engine_start_s": engine_start_s, **found}


def wait_for_all(service: Service, logs: Path, began: float) -> dict[str, float]:
    deadline = time.monotonic() + DEADLINE_S
    while len(found := dict(seen(logs))) < len(MARKS):
        if service.returncode is not None or time.monotonic() > deadline:
            missing = [mark.name for mark in MARKS if mark.name not in found]
            raise RuntimeError(f"not seen: {', '.join(missing)}; {service.log_tail()}")
        time.sleep(POLL_S)
    return {name: at - began for name, at in found.items()}


def seen(logs: Path) -> Iterator[tuple[str, float]]:
    for mark in MARKS:
        path = logs / f"{mark.log}.log"
        lines = map(parse_line, path.read_text(errors="replace").splitlines() if path.exists() else [])
        at = next((line.at for line in lines if line and mark.words in line.message), None)
        if at is not None:
            yield mark.name, at


def report(rows: list[Row]) -> None:
    table = Table("seconds since `headrace up`", *(f"run {turn}" for turn in range(len(rows))), title="startup")
    for name in (mark.name for mark in MARKS):
        table.add_row(name, *(f"{row[name]:.1f}" for row in rows))
    table.add_row("the engine's own start", *(f"{row['engine_start_s']:.1f}" for row in rows))
    Console().print(table)
