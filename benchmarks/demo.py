"""The demo on several seeds: `python -m benchmarks.demo` runs `headrace up` for each of them and prints a table.

    python -m benchmarks.demo --seeds 0 1 2 --at-least 0.80
    python -m benchmarks.demo --recipe configs/guessing-cpu.yaml
    python -m benchmarks.demo --vary generation.engine.swap_mode=retract generation.engine.swap_mode=in_place

Writes its rows to `benchmarks/results/demo.json`, with `--vary` to `demo-varied.json` there, and those of another
recipe to a file with its name (`demo-guessing-cpu.json`). The exit code is 1 if a run fails or its held-out accuracy is
below `--at-least`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = "configs/tiny-cpu.yaml"
GPUS = Path("/proc/driver/nvidia/gpus")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo")
    parser.add_argument("--recipe", type=Path, default=Path(RECIPE), help=f"default: {RECIPE}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-least", type=float, default=0.0, help="lowest held-out accuracy that counts as success")
    parser.add_argument(
        "--vary", nargs="+", default=[], metavar="SETTING=VALUE", help="settings to run each seed with, one at a time"
    )
    arguments = parser.parse_args()
    settings = [["--set", setting] for setting in arguments.vary] or [[]]
    rows = [run_demo(str(arguments.recipe), seed, *setting) for seed in arguments.seeds for setting in settings]
    machine = this_machine()
    RESULTS.mkdir(exist_ok=True)
    name = "demo" + (f"-{arguments.recipe.stem}" if arguments.recipe != Path(RECIPE) else "")
    (RESULTS / f"{name}{'-varied' if arguments.vary else ''}.json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n"
    )
    print_table(rows, machine)
    return int(any(row["held_out_after"] < arguments.at_least for row in rows))


def headrace_up(recipe: str, run: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "headrace.launcher", "up", str(ROOT / recipe), "--run", run, *arguments]


def run_demo(recipe: str, seed: int, *setting: str) -> dict[str, Any]:
    """One whole run; `total_s` is the duration of the command, which a user would wait."""
    run = f"benchmark-{time.strftime('%Y%m%d-%H%M%S')}-seed-{seed}"
    started = time.monotonic()
    subprocess.run(headrace_up(recipe, run, "--seed", str(seed), *setting), cwd=ROOT, check=True)
    summary: dict[str, Any] = json.loads((ROOT / "runs" / run / "summary.json").read_text())
    return {"seed": seed, "setting": " ".join(setting[1:]), "total_s": round(time.monotonic() - started, 1), **summary}


def this_machine() -> dict[str, Any]:
    """The machine that the numbers were measured on."""
    machine = {"cores": os.cpu_count(), "cpu": cpu_model()}
    gpus = [said_in(path, "Model") for path in GPUS.glob("*/information")]
    return machine | ({"gpus": gpus} if gpus else {}) | {"python": platform.python_version()}


def cpu_model() -> str:
    return said_in(Path("/proc/cpuinfo"), "model name")


def said_in(path: Path, name: str) -> str:
    """The first value of that name in a file of Linux's `/proc`."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")


def print_table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    table = Table(title=f"demo on {machine['cores']} cores of {machine['cpu']}")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "seed": lambda r: " ".join([str(r["seed"]), r["setting"]]),
        "held-out before": lambda r: f"{r['held_out_before']:.3f}",
        "after": lambda r: f"{r['held_out_after']:.3f}",
        "steps": lambda r: str(r["steps"]),
        "training s": lambda r: f"{r['wall_s']:.0f}",
        "whole command s": lambda r: f"{r['total_s']:.0f}",
        "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
        "pause ms p50 / p95": lambda r: f"{r['weight_pause_ms']['p50']:.0f} / {r['weight_pause_ms']['p95']:.0f}",
        "staleness mean / max": lambda r: f"{r['staleness']['mean']:.2f} / {r['staleness']['max']:.0f}",
        "trained / uniform / stale / dead": lambda r: " / ".join(
            str(r["groups"][state]) for state in ("trained", "uniform", "stale", "dead")
        ),
        "waited: generation / learner": lambda r: f"{r['lag']['generation']:.0%} / {r['lag']['learner']:.0%}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console(width=200).print(table)


if __name__ == "__main__":
    sys.exit(main())
