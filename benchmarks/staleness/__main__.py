"""Which loss learns from stale groups: `python -m benchmarks.staleness` screens losses, studies the best, and reports.

    screen   every loss at staleness 8, one seed
    study    the baseline loss and the three best (or --losses) at staleness 0, 8, 16, then 1, 4, 32; three seeds
    long     the study's first part on a second task, with longer answers (benchmarks/tasks/long_arithmetic.py)
    splits   the default loss with other mini-batches, at staleness 0, 2 and 16; three seeds
    guard    the baseline loss where it collapses, without the guard and with it
    report   writes tables and a plot of all runs into docs/staleness.md

Each run uses the real trainer on groups that all have exactly the given staleness (forced_staleness.py), in a separate
process, on one thread, and measures accuracy on 2,048 held-out problems. Results are kept in
benchmarks/results/staleness.json; a run is not repeated as long as its settings are the same. `--minutes` limits the
time.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.demo import ROOT
from benchmarks.staleness.results import Results
from benchmarks.staleness.runs import (
    BY_NAME,
    EVALUATE_EVERY,
    FIRST_STALENESSES,
    LOSSES,
    NUM_BEST,
    NUM_HELD_OUT,
    SCREENED,
    SEEDS,
    SPLIT_STALENESSES,
    SPLITS,
    STALENESSES,
    Run,
    guarded,
)
from benchmarks.tasks.long_arithmetic import POLICY, make_policy

PARTS = ("screen", "study", "splits", "long", "guard")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness")
    parser.add_argument("what", nargs="?", default="all", choices=("all", *PARTS, "report", "one"))
    parser.add_argument("--losses", nargs="+", choices=list(BY_NAME), default=None)
    parser.add_argument("--staleness", type=int, nargs="+", default=None)
    parser.add_argument("--long", action="store_true", help="for `one`: use the second task")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="minutes after which no further run begins")
    arguments = parser.parse_args()
    if arguments.what == "one":
        run = Run(arguments.losses[0], arguments.staleness[0], arguments.seeds[0], arguments.long)
        print(json.dumps(run_here(run)))
        return 0
    results, ends_at = Results(), time.monotonic() + 60 * arguments.minutes
    for part in PARTS if arguments.what == "all" else [arguments.what]:
        run_all(runs_of(part, results, arguments), results, arguments.processes, ends_at)
    from benchmarks.staleness.report import write_report  # and matplotlib, which a run's process does without

    write_report(results)
    return 0


def runs_of(part: str, results: Results, arguments: argparse.Namespace) -> Iterator[Run]:
    """A part's runs in their order; the screening determines those of `study` and `long`."""
    losses = arguments.losses or ["baseline", *best(results)]
    if part == "screen":
        yield from (Run(loss, SCREENED, SEEDS[0]) for loss in arguments.losses or LOSSES)
    elif part == "study":
        yield from study(losses, arguments.staleness or STALENESSES, arguments.seeds)
    elif part == "long":
        make_long_policy()
        for run in study(losses, arguments.staleness or FIRST_STALENESSES, arguments.seeds):
            yield run._replace(is_long=True)
    elif part == "splits":
        stalenesses = arguments.staleness or SPLIT_STALENESSES
        yield from (Run(*run) for run in itertools.product(SPLITS, stalenesses, arguments.seeds))
    elif part == "guard":
        make_long_policy()
        yield from (run for seed in arguments.seeds for run in guarded(seed))


def make_long_policy() -> None:
    if not (ROOT / POLICY).exists():
        make_policy(ROOT / POLICY)


def study(losses: list[str], stalenesses: Iterable[int], seeds: Iterable[int]) -> Iterator[Run]:
    """The most informative runs first: the baseline loss and the best ones at the stalenesses that decide the
    default."""
    first = [staleness for staleness in stalenesses if staleness in FIRST_STALENESSES]
    rest = [staleness for staleness in stalenesses if staleness not in FIRST_STALENESSES]
    for some, levels in ((losses[:2], first), (losses[2:], first), (losses, rest)):
        for seed in seeds:
            yield from (Run(loss, staleness, seed) for staleness in levels for loss in some)


def best(results: Results) -> list[str]:
    """The best losses of the screening beside the baseline: by the mean of all accuracies of the run, so that a dip
    counts."""

    def merit(loss: str) -> float:
        row = results.of(Run(loss, SCREENED, SEEDS[0]))
        return sum(row["accuracy"].values()) if row else 0.0

    return sorted((loss for loss in LOSSES if loss != "baseline"), key=merit, reverse=True)[:NUM_BEST]


def run_all(runs: Iterable[Run], results: Results, num_processes: int, ends_at: float) -> None:
    def run_one(run: Run) -> None:
        if results.of(run) is None and time.monotonic() < ends_at:
            row = run_in_a_process(run)
            results.add(run, row)
            print(f"{run.name}: {row['accuracy']}, {row['cpu_s']:.0f} CPU s", flush=True)

    with ThreadPoolExecutor(num_processes) as processes:
        list(processes.map(run_one, runs))


def run_in_a_process(run: Run) -> dict[str, Any]:
    which = ["--losses", run.loss, "--staleness", str(run.staleness), "--seeds", str(run.seed)]
    which += ["--long"] if run.is_long else []
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.staleness", "one", *which]
    done = subprocess.run(command, cwd=ROOT, check=True, env=os.environ | threads, stdout=subprocess.PIPE)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def run_here(run: Run, on_row: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    from benchmarks.staleness.forced_staleness import WATCHED
    from benchmarks.staleness.forced_staleness import run as forced
    from headrace.common.config import load_recipe

    config = load_recipe(ROOT / "configs" / "tiny-cpu.yaml", run.settings).config
    started, accuracy = time.process_time(), {}
    columns: dict[str, list[float | None]] = {name: [] for name in ("reward_mean", *WATCHED, "guard_notch")}
    for row in forced(config, NUM_HELD_OUT, EVALUATE_EVERY):
        on_row(row)
        if row["kind"] == "evaluation":
            accuracy[row["step"]] = round(row["held_out"], 4)
        else:
            for name, column in columns.items():
                column.append(float(f"{row[name]:.3g}") if name in row else None)
    return {
        "settings": run.settings,
        "steps": config.learner.steps,
        "cpu_s": round(time.process_time() - started, 1),
        "accuracy": accuracy,
        "columns": columns,
    }


if __name__ == "__main__":
    sys.exit(main())
