"""Headrace's side of the comparison with TRL: `headrace up` with a real engine and Redis.

Its checkpoints are its policies. A checkpoint every `save_every` steps is included in the times, and so are those that
the learner adds where a step takes long. Accuracy is measured only for the former, as on TRL's side. The evaluation
before the first step, with one prompt, runs beside the first tickets.
"""

import os
import shutil
import subprocess
import threading
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.compare.runs import Outcome, Workload
from benchmarks.demo import ROOT, headrace_up
from headrace.common.config import RunConfig
from headrace.learner.checkpoints.record import read_record
from headrace.learner.reporting.summary import METRICS_FILE, read_rows

MASTER = "master."
POLL_S = 0.3
MODEL_FILE = "model.safetensors"


def run(workload: Workload, overrides: list[str], config: RunConfig, folder: Path, name: str) -> Outcome:
    """`overrides` turn the workload's recipe into `config`; the policies are left in `folder`."""
    where = ROOT / "runs" / name
    shutil.rmtree(where, ignore_errors=True)
    settings = [word for override in overrides for word in ("--set", override)]
    over = threading.Event()
    watcher = threading.Thread(target=_collect, args=(where / "checkpoints", folder, workload.save_every, over))
    watcher.start()
    try:
        command = headrace_up(workload.recipe, name, *settings)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    finally:
        over.set()
        watcher.join()
    policies = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    for path in policies.values():
        _as_policy(path, ROOT / config.model.path)
    num_threads = config.learner.num_threads or os.cpu_count() or 1
    steps = [row for row in read_rows(where / METRICS_FILE) if row["kind"] == "step"]
    return Outcome("headrace", num_threads, steps, policies)


def _collect(checkpoints: Path, folder: Path, save_every: int, over: threading.Event) -> None:
    """Copies every checkpoint at a multiple of `save_every` while it exists: the learner keeps only two."""
    seen: set[str] = set()
    is_last = False
    while not is_last:
        is_last = over.wait(POLL_S)
        for path in sorted(checkpoints.glob("checkpoint-*")):
            if path.name not in seen:
                seen.add(path.name)
                step = read_record(path).step
                if step % save_every == 0:
                    shutil.copytree(path, folder / f"step-{step}", dirs_exist_ok=True)


def _as_policy(path: Path, start: Path) -> None:
    """Turns a copied checkpoint into a policy in Hugging Face format, with the initial one's other files."""
    state = load_file(path / "state.safetensors")
    weights = {name.removeprefix(MASTER): tensor for name, tensor in state.items() if name.startswith(MASTER)}
    shutil.rmtree(path)
    shutil.copytree(start, path)
    save_file(weights, path / MODEL_FILE, {"format": "pt"})
