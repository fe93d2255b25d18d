"""Headrace and TRL's `GRPOTrainer` on the same cores: seconds per batch, seconds to an accuracy, and final accuracy.

One recipe defines policy, task, prompts in their order, group size, sampling, loss and optimizer for both. Both train
on every group that they sample (`actor.dynamic_sampling: false`; TRL has no other mode): a uniform group has advantage
0, gives no gradient and is not replaced; Headrace skips its computation, TRL does not. Both distribute the completions
of a batch over its mini-batches (`actor.mini_batch_split: completions`, as TRL does). Headrace is `headrace up`: a
replica with SGLang, Redis, the learner, and groups up to `learner.max_staleness` steps old. TRL generates and trains in
turn in one process, with one and with two threads; the better result counts. Start-up is not timed on either side, and
neither is evaluation, of saved policies, by the same code (held_out.py). Saving them is timed.

On the heavy tail TRL runs with two threads only: with one a batch took 115 s instead of 69.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.compare import headrace_side, trl_side
from benchmarks.compare.held_out import accuracy
from benchmarks.compare.part import Part, Ratio
from benchmarks.compare.runs import Outcome, Workload
from benchmarks.demo import ROOT
from benchmarks.tasks import heavy_tail
from headrace.common.config import RunConfig, load_recipe

SHORT = Workload(
    name="demo",
    recipe="configs/tiny-cpu.yaml",
    held_out_problems=1024,
    save_every=5,
    target=0.8,
    goal=1.5,
    trl_micro_batch=128,
    trl_threads=(1, 2),
)
LONG = Workload(
    name="heavy tail",
    recipe="benchmarks/compare/heavy-tail.yaml",
    held_out_problems=256,
    save_every=4,
    target=0.8,
    goal=2.5,
    trl_micro_batch=16,
    trl_threads=(2,),
)
SAME = (
    "actor.dynamic_sampling=false",
    "actor.mini_batch_split=completions",
    "actor.divergence_guard=warn",
    "evaluation.interval_steps=0",
    "evaluation.num_prompts=1",
    "evaluation.completions_per_prompt=1",
)
NO_WORSE = 0.98
"""The share of TRL's accuracy that Headrace's must reach: the standard error of both evaluations is 2 %."""


def short(recipe: str) -> Workload:
    """The short workload of the demo's recipe; with another recipe it measures only seconds per batch."""
    if recipe == SHORT.recipe:
        return SHORT
    other = SHORT._replace(name=Path(recipe).stem, recipe=recipe, target=None)
    return other._replace(trl_micro_batch=16, trl_threads=(os.cpu_count() or 1,))


def compare(workload: Workload, seeds: Iterable[int], earlier: list[dict[str, Any]]) -> Iterator[Part]:
    """Yields, after each seed, the results of all seeds, with those in `earlier` that have the same settings."""
    if workload is LONG and not (ROOT / heavy_tail.POLICY).exists():
        heavy_tail.make_policy(ROOT / heavy_tail.POLICY)
    trl_side.make_environment()
    rows = earlier
    for seed in seeds:
        found = measure(workload, seed)
        rows = [row for row in rows if row["seed"] != seed and row.get("settings") == found[0]["settings"]] + found
        rows.sort(key=lambda row: int(row["seed"]))
        yield Part(rows, ratios(workload, rows))


def measure(workload: Workload, seed: int) -> list[dict[str, Any]]:
    """One row per run."""
    overrides = [f"seed={seed}", f"learner.checkpoint_interval_steps={workload.save_every}", *SAME]
    config = load_recipe(ROOT / workload.recipe, overrides).config
    rows = []

    def add(found: Outcome) -> None:
        rows.append(row_of(workload, seed, config, found))
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory(prefix="headrace-trl-") as folder:
        name = f"compare-{workload.name.replace(' ', '-')}-{seed}"
        add(headrace_side.run(workload, overrides, config, Path(folder) / "headrace", name))
        for num_threads in workload.trl_threads:
            add(trl_side.run(workload, config, Path(folder) / f"trl-{num_threads}", num_threads))
    return rows


def row_of(workload: Workload, seed: int, config: RunConfig, found: Outcome) -> dict[str, Any]:
    policies = {} if workload.target is None else found.policies
    held_out = {step: accuracy(path, config, workload.held_out_problems) for step, path in sorted(policies.items())}
    lengths = [row["completion_tokens_mean"] for row in found.steps]
    return {
        "workload": workload.name,
        "settings": settings_of(workload, config),
        "seed": seed,
        "who": found.who,
        "num_threads": found.num_threads,
        "num_steps": found.steps[-1]["step"],
        "s_per_batch": round(found.s_per_step(), 4),
        "whole_s": round(found.steps[-1]["wall_s"], 2),
        "s_to_target": None if workload.target is None else found.s_to(workload.target, held_out),
        "held_out": held_out,
        "completion_tokens_mean": round(sum(lengths) / len(lengths), 1),
    }


def settings_of(workload: Workload, config: RunConfig) -> str:
    """The settings by which runs are told apart that must not be combined."""
    said = config.model_dump_json(exclude={"seed"}) + repr(workload)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def ratios(workload: Workload, rows: list[dict[str, Any]]) -> list[Ratio]:
    """One value per seed; where TRL does not reach the accuracy, its whole time is a lower bound."""
    mine = [row for row in rows if row["workload"] == workload.name]
    pairs = []
    for seed in sorted({row["seed"] for row in mine}):
        (ours,) = (row for row in mine if row["seed"] == seed and row["who"] == "headrace")
        theirs = min((row for row in mine if row["seed"] == seed and row["who"] == "trl"), key=_speed)
        pairs.append((ours, theirs))
    speed = [_speed(theirs) / _speed(ours) for ours, theirs in pairs]
    found = [Ratio(f"{workload.name}: seconds a batch, TRL / Headrace", speed, workload.goal)]
    if workload.target is not None:
        to_target = [_s_to_target_over(ours, theirs) for ours, theirs in pairs]
        final = [_last(ours) / _last(theirs) for ours, theirs in pairs]
        name = f"{workload.name}: seconds to {workload.target:g} held out, TRL / Headrace"
        found.append(Ratio(name, to_target, workload.goal))
        found.append(Ratio(f"{workload.name}: held out at last, Headrace / TRL", final, NO_WORSE))
    return found


def _s_to_target_over(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    reached = ours["s_to_target"]
    return float((theirs["s_to_target"] or theirs["whole_s"]) / reached) if reached else 0.0


def _speed(row: dict[str, Any]) -> float:
    return float(row["s_per_batch"])


def _last(row: dict[str, Any]) -> float:
    return float(row["held_out"][max(row["held_out"], key=int)])  # numbers are text in a file
