"""`headrace export`: writes a policy of a run in Hugging Face format into a folder. Needs only the run's folder.

    python -m headrace.learner.commands.export --run demo --runs-folder runs --best --output exported

Without `--best` or `--step` it exports the finished run's policy, or the newest checkpoint's if that is later. It is
safe while the run is going on: a file that is replaced while it is read is looked up again. The output is written
completely or not at all.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from headrace.common.process.atomic_files import publish_atomically
from headrace.common.redis.keys import Keys
from headrace.common.weights.files import MODEL_FILE
from headrace.learner.checkpoints.best import CONFIG_FOLDER, UNCHANGED_FOLDER, best_folder, read_best_record
from headrace.learner.checkpoints.record import UnreadableCheckpoint, checkpoint_folders, read_record

NUM_TRIES = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="headrace export")
    parser.add_argument("--run", required=True)
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="the best by held-out accuracy")
    which.add_argument("--step", type=int, help="of a checkpoint that is still kept, or of the best")
    parser.add_argument("--output", type=Path, required=True, help="a new or empty folder")
    arguments = parser.parse_args()
    try:
        Keys(arguments.run)  # raises if the name is not valid
        print(export(arguments.runs_folder / arguments.run, arguments.output, arguments.best, arguments.step))
    except (ValueError, OSError) as error:
        print(f"headrace export: {error}", file=sys.stderr)
        return 2
    return 0


def export(run: Path, output: Path, is_best: bool = False, step: int | None = None) -> str:
    """Returns what was exported, as text. Raises `ValueError` naming the steps that there are instead."""
    if not run.is_dir():
        raise ValueError(f"run {run.name!r}: there is no folder {run}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already; expected a new or empty folder")
    aside = output.with_name(f".{output.name}.aside")
    output.parent.mkdir(parents=True, exist_ok=True)
    for tries_left in reversed(range(NUM_TRIES)):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            what = _write(run, aside, is_best, step)
            break
        except FileNotFoundError:  # replaced by the learner meanwhile
            if not tries_left:
                raise
    publish_atomically(aside, output)
    return f"{what} is in {output}"


def _write(run: Path, aside: Path, is_best: bool, step: int | None) -> str:
    best, folder = read_best_record(run), best_folder(run)
    checkpoints = list(_checkpoints(run))
    if folder is not None and best is not None and (is_best or step == best.step):
        shutil.copytree(folder, aside)
        return f"step {best.step} of run {run.name}, the best (held-out {best.held_out:.4f})"
    if is_best:
        raise ValueError(f"run {run.name!r} has no best policy: no evaluation is complete")
    newest = max((number for number, _ in checkpoints), default=-1)
    finished = _finished_step(run)
    if finished is not None and (step == finished or (step is None and finished >= newest)):
        shutil.copytree(run / "policy", aside)
        return f"step {finished} of run {run.name}, its last"
    for number, checkpoint in checkpoints:
        if step in (number, None):
            _from_checkpoint(run, checkpoint, aside)
            return f"step {number} of run {run.name}, from {checkpoint.name}"
    others = (finished, None if best is None else best.step)
    there = sorted({number for number, _ in checkpoints} | {number for number in others if number is not None})
    wanted = "a policy" if step is None else f"step {step}"
    raise ValueError(f"run {run.name!r} has not kept {wanted}; there are {there or 'no checkpoints yet'}")


def _checkpoints(run: Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of the readable checkpoints, the newest first."""
    for folder in reversed(checkpoint_folders(run / "checkpoints")):
        try:
            yield read_record(folder).step, folder
        except UnreadableCheckpoint:
            continue


def _finished_step(run: Path) -> int | None:
    """The step of `policy/`, if the run was ever complete."""
    summary = run / "summary.json"
    if not ((run / "policy").is_dir() and summary.is_file()):
        return None
    steps: int = json.loads(summary.read_text())["steps"]
    return steps


def _from_checkpoint(run: Path, checkpoint: Path, aside: Path) -> None:
    """Exports the masters, rounded to the policy's dtype, in the layout of the model's checkpoint, with configuration
    and tokenizer."""
    import torch
    from safetensors.torch import save_file

    from headrace.learner.distributed.state_files import read_state
    from headrace.learner.model.checkpoint_layout import published_tensors

    if not (run / CONFIG_FOLDER).is_dir():
        raise ValueError(f"run {run.name!r} has no folder {CONFIG_FOLDER}: a learner of an earlier release wrote it")
    shutil.copytree(run / CONFIG_FOLDER, aside)
    dtype = getattr(torch, json.loads((aside / "config.json").read_text())["dtype"])
    state = read_state(checkpoint, list(read_record(checkpoint).files))
    masters = {name: tensor for name, tensor in state.items() if name.startswith("master.")}
    rounded = {name.removeprefix("master."): tensor.to(dtype) for name, tensor in masters.items()}
    tensors = published_tensors(rounded, aside, run / UNCHANGED_FOLDER / MODEL_FILE)
    save_file(tensors, aside / MODEL_FILE, metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
