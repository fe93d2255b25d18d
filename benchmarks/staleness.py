"""Which loss learns from stale groups: `python -m benchmarks.staleness screen`, then `study`, then `report`.

    screen   every loss at staleness 8, one seed
    study    chosen losses (--losses) at staleness 0, 1, 4, 8, 16 and 32, three seeds
    report   tables and a plot of what has been run, into docs/

Each run is the real trainer on groups that are exactly so stale (benchmarks/forced_staleness.py), in a process of its
own, on one thread, with accuracy on 2,048 held-out problems. A run that has been finished is not run again: its rows
are in benchmarks/results/staleness/, named by what it ran; `--processes` runs at a time.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "staleness"
STALENESSES = (0, 1, 4, 8, 16, 32)
SEEDS = (0, 1, 2)
SCREENED = 8
NUM_STEPS, NUM_HELD_OUT, EVALUATE_EVERY = 100, 2048, 20
BASE = ["actor.mini_batches=1", f"learner.steps={NUM_STEPS}", "evaluation.num_prompts=2048", "evaluation.num_samples=1"]
"""On top of the demo's recipe."""
SEQUENCE, NO_CLIP = "actor.ratio_gradient=sequence", "actor.behaviour_clip=false"
LOSSES: dict[str, list[str]] = {
    "seed": [SEQUENCE, NO_CLIP],
    "seed, 4 mini-batches": [SEQUENCE, NO_CLIP, "actor.mini_batches=4"],
    "uncorrected": [SEQUENCE, NO_CLIP, "actor.behav_imp_weight_mode=disabled"],
    "coupled": [SEQUENCE, NO_CLIP, "actor.use_decoupled_loss=false"],
    "coupled, gradient per token": [NO_CLIP, "actor.use_decoupled_loss=false"],
    "paper": ["actor.preset=paper"],
    "gradient per token": [NO_CLIP],
    "behaviour clip": [SEQUENCE],
    "both": [],
    "both, 2 mini-batches": ["actor.mini_batches=2"],
    "both, 4 mini-batches": ["actor.mini_batches=4"],
    "both, truncated weights": ["actor.behav_imp_weight_mode=token_truncate"],
    "both, weights at most 2": ["actor.behav_imp_weight_mode=token_truncate", "actor.behav_imp_weight_cap=2"],
    "both, sequence weights masked": ["actor.behav_imp_weight_mode=sequence_mask"],
    "both, sequence weights truncated": ["actor.behav_imp_weight_mode=sequence_truncate"],
    "both, no weights": ["actor.behav_imp_weight_mode=disabled"],
    "both, clipped below only": ["actor.eps_clip_higher=1000"],
    "both, clip at a tenth": ["actor.eps_clip=0.1", "actor.eps_clip_higher=0.1"],
    "token level": [NO_CLIP, "actor.importance_sampling_level=token"],
    "token level, behaviour clip": ["actor.importance_sampling_level=token"],
}
"""Settings over `BASE`. `both`: a gradient per token and the behaviour clip, Headrace's default."""


class Run(NamedTuple):
    loss: str
    staleness: int
    seed: int

    @property
    def path(self) -> Path:
        name = self.loss.replace(", ", "--").replace(" ", "-")
        return RESULTS / f"{name}-staleness-{self.staleness}-seed-{self.seed}.jsonl"

    @property
    def accuracies(self) -> dict[int, float]:
        """Held-out accuracy by step; empty if it has not been run."""
        rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return {row["step"]: row["held_out"] for row in rows if row["kind"] == "evaluation"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness")
    parser.add_argument("what", choices=("screen", "study", "report", "one"))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=None)
    parser.add_argument("--staleness", type=int, nargs="+", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.what == "one":
        run_here(Run(arguments.losses[0], arguments.staleness[0], arguments.seeds[0]))
        return 0
    is_screening = arguments.what == "screen"
    losses = arguments.losses or list(LOSSES)
    stalenesses = arguments.staleness or ([SCREENED] if is_screening else STALENESSES)
    seeds = arguments.seeds or ([0] if is_screening else SEEDS)
    runs = [Run(loss, staleness, seed) for seed in seeds for staleness in stalenesses for loss in losses]
    if arguments.what != "report":
        with ThreadPoolExecutor(arguments.processes) as processes:
            list(processes.map(run_in_a_process, [run for run in runs if not run.path.exists()]))
    print_table(runs)
    return 0


def run_in_a_process(run: Run) -> None:
    which = ["--losses", run.loss, "--staleness", str(run.staleness), "--seeds", str(run.seed)]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", __spec__.name, "one", *which], cwd=ROOT, check=True, env=os.environ | threads)


def run_here(run: Run) -> None:
    from benchmarks.forced_staleness import run as forced
    from common.config import load_recipe

    overrides = [*BASE, *LOSSES[run.loss], f"seed={run.seed}"]
    config = load_recipe(ROOT / "configs" / "tiny-cpu.yaml", overrides).config
    RESULTS.mkdir(parents=True, exist_ok=True)
    aside = run.path.with_suffix(".aside")
    with aside.open("w", buffering=1) as file:
        for row in forced(config, run.staleness, NUM_HELD_OUT, EVALUATE_EVERY):
            file.write(json.dumps(row) + "\n")
    aside.replace(run.path)
    print(f"{run.loss}, staleness {run.staleness}, seed {run.seed}: {run.accuracies}", flush=True)


def print_table(runs: Iterable[Run]) -> None:
    table = Table(title="held-out accuracy, lowest to highest of the seeds, by step")
    for name in ("loss", "staleness", "seeds", *(str(step) for step in range(0, NUM_STEPS + 1, EVALUATE_EVERY))):
        table.add_column(name, justify="right")
    cells: dict[tuple[str, int], list[dict[int, float]]] = {}
    for run in runs:
        if found := run.accuracies:
            cells.setdefault((run.loss, run.staleness), []).append(found)
    for (loss, staleness), found_of in cells.items():
        steps = sorted(found_of[0])
        spread = [(min(f[step] for f in found_of), max(f[step] for f in found_of)) for step in steps]
        told = [f"{low:.3f}" if low == high else f"{low:.3f}–{high:.3f}" for low, high in spread]
        table.add_row(loss, str(staleness), str(len(found_of)), *told)
    Console(width=200).print(table)


if __name__ == "__main__":
    sys.exit(main())
