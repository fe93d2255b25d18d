"""Asynchronous against synchronous Headrace, with the same recipe: how much of generation and training overlaps.

Synchronous means `learner.max_staleness: 0`: a batch in training still counts as outstanding, so that no ticket is open
meanwhile. The replica generates a batch, the learner trains it, the replica swaps. Generation and training thus have
the machine to themselves in turn, and their durations are those without competition: `wait_s` of the learner (with the
swap to the new version) and the rest of `step_s`. With a perfect overlap an asynchronous step would take as long as the
longer of the two. The seconds of an asynchronous step are those between its row and the row before, so that nothing is
left out (checkpoints, rows, group samples).

In the asynchronous run both compete for the same cores, in the synchronous one they do not. On few cores, which an
engine or a learner can use fully, the ratio therefore depends on the machine as much as on Headrace. On the other hand
a synchronous replica never has more than one batch of groups in flight, and its last completions run alone, so that its
generation is slower than that of a full engine. The yardstick is therefore this run without overlap, not the engine's
best speed (for that see generation.py).
"""

import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare.part import Part, Ratio
from benchmarks.demo import headrace_up
from headrace.launcher.run.processes import Service
from headrace.learner.reporting.summary import METRICS_FILE, read_rows

NUM_STEPS, NUM_WARMING = 24, 4
DEADLINE_S = 900.0
SETTINGS = {"asynchronous": [], "synchronous": ["learner.max_staleness=0"]}
COMMON = [f"learner.steps={NUM_STEPS}", "evaluation.interval_steps=0", "evaluation.num_prompts=16"]
Row = dict[str, Any]


def measure(recipe: str, repeats: int) -> Part:
    rows = []
    with tempfile.TemporaryDirectory(prefix="headrace-synchronous-") as folder:
        for turn in range(repeats):
            for mode in list(SETTINGS) if turn % 2 else list(SETTINGS)[::-1]:
                rows.append(train(recipe, Path(folder), mode, turn))
                print(json.dumps(rows[-1]), flush=True)
    steps = {mode: [row for row in rows if row["mode"] == mode] for mode in SETTINGS}
    pairs = list(zip(steps["asynchronous"], steps["synchronous"], strict=True))
    hidden = [ours["step_s"] / max(alone["generation_s"], alone["training_s"]) for ours, alone in pairs]
    faster = [alone["step_s"] / ours["step_s"] for ours, alone in pairs]
    ratios = [Ratio("step over the longer of generation and training alone", hidden, 1.15, is_ceiling=True)]
    return Part(rows, [*ratios, Ratio("steps/s over synchronous", faster, 1.0)])


def train(recipe: str, folder: Path, mode: str, turn: int) -> Row:
    """Means over the steps after the first few."""
    run = f"{mode}-{turn}"
    settings = [part for setting in (*COMMON, *SETTINGS[mode]) for part in ("--set", setting)]
    command = headrace_up(recipe, run, "--seed", str(turn), "--runs-folder", str(folder), *settings)
    service = Service(run, command, folder / f"{run}.log")
    try:
        service.process.wait(DEADLINE_S)
    finally:
        service.stop(60.0)
    if service.returncode != 0:
        raise RuntimeError(f"{service.exit_summary()}: {service.log_tail()}")
    steps = [row for row in read_rows(folder / run / METRICS_FILE) if row["kind"] == "step"]
    first, *later = steps[NUM_WARMING - 1 :]
    between = [after["time_s"] - before["time_s"] for before, after in itertools.pairwise([first, *later])]
    num_tokens = later[-1]["run_generated_tokens"] - first["run_generated_tokens"]
    return {
        "mode": mode,
        "seed": turn,
        "step_s": statistics.mean(between),
        "generation_s": statistics.mean(row["wait_s"] for row in later),
        "training_s": statistics.mean(row["step_s"] - row["wait_s"] for row in later),
        "tokens_per_step": num_tokens / len(later),
        "tokens_per_s": num_tokens / sum(between),
        "staleness_mean": statistics.mean(row["staleness_mean"] for row in later),
        "uniform_share": later[-1]["run_uniform_share"],
        "load_average": os.getloadavg()[0],
    }
