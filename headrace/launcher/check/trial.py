"""Tries a recipe's prompts and its reward or rollout before anything starts, in processes of their own.

The first hundred prompts of each split are rendered, tokenized and encoded as the learner does it, and compared with
the engine's context; then a reward worker scores an empty completion of each split, or an environment worker plays an
episode of each with empty replies. A problem that would end the run is raised. A prompt that the run would skip is a
note.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from headrace.common.config import RunConfig
from headrace.common.models.context_length import fits_context
from headrace.common.preflight.recipe import UnavailableHere
from headrace.common.process.child_process import python_path, set_parent_death_signal
from headrace.launcher.check.prompt_trial import SplitTrial, TaskTrial

NUM_PROMPTS = 100
DEADLINE_S = 900.0
"""Long enough to download a data set."""
MISSING = "ModuleNotFoundError"
"""Text in a worker's error that means that a library is missing, which another machine may have."""


def try_task(config: RunConfig, is_model_here: bool = True) -> TaskTrial:
    """Without the model, tries only the task.

    Raises `ValueError`, or its subclass `UnavailableHere`, with one line that names the task, the split and the row.
    """
    name, plain = config.task.name, config.model_copy(update={"redis_url": None}).model_dump_json()
    with (
        child("headrace.generation.task_trial", plain) as computed,
        child("headrace.launcher.check.prompt_trial", plain, str(NUM_PROMPTS * is_model_here)) as prompts,
    ):
        found = msgspec.msgpack.decode(prompts.answer(name), type=TaskTrial)
        if found.problem:
            raise (UnavailableHere if found.is_only_here else ValueError)(found.problem)
        for split, trial in found.splits.items():
            if trial.lengths and not count_fitting(trial, found):
                raise ValueError(_none_fits(split, trial, found))
        tickets = [trial.ticket for trial in found.splits.values()]
        problem = computed.answer(name, msgspec.msgpack.encode(tickets)).decode()
    if problem:
        text = f"task {name!r}: {problem}; expected a finite number"
        raise (UnavailableHere if MISSING in problem else ValueError)(text)
    return found


def trial_notes(found: TaskTrial) -> Iterator[str]:
    """Notes on prompts that the run will skip."""
    for split, trial in found.splits.items():
        tried = len(trial.lengths) + len(trial.refused)
        if trial.refused:
            yield (
                f"{len(trial.refused)} of the first {tried} {split} prompts cannot become tickets and are skipped: "
                f"{trial.refused[0]}"
            )
        skipped = len(trial.lengths) - count_fitting(trial, found)
        if skipped:
            longest = max(trial.lengths)
            yield (
                f"{skipped} of the first {tried} {split} prompts do not fit the context and are skipped: the longest "
                f"has {longest:,} tokens, and of {found.context:,} that leaves {max(0, found.context - longest):,} for "
                f"{_room_wanted(found)}"
            )


def count_fitting(trial: SplitTrial, found: TaskTrial) -> int:
    """The number of prompts that leave room for a completion, or for the first token of an episode."""
    return sum(fits_context(length, found.min_new_tokens, found.context) for length in trial.lengths)


def _none_fits(split: str, trial: SplitTrial, found: TaskTrial) -> str:
    shortest = min(trial.lengths)
    instead = f"at most {found.context - shortest:,}" if shortest < found.context else "shorter prompts"
    return (
        f"none of the first {len(trial.lengths)} {split} prompts leaves room for {_room_wanted(found)} in the context "
        f"of {found.context:,} tokens (the shortest has {shortest:,}); expected {instead}"
    )


def _room_wanted(found: TaskTrial) -> str:
    return "an episode's first token" if found.has_rollout else f"sampling.max_new_tokens {found.min_new_tokens:,}"


class _Child:
    """A running module's process; its output goes to this process's standard error."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self._process = process
        self._output = output

    def answer(self, task: str, rest: bytes = b"") -> bytes:
        """Sends the rest of the input and returns what the process writes. Raises `ValueError`."""
        try:
            self._process.communicate(rest, timeout=DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"task {task!r}: not tried within {DEADLINE_S:g} s") from error
        if self._process.returncode:
            raise ValueError(f"task {task!r}: trying it ended with {self._process.returncode}")
        return self._output.read_bytes()


@contextmanager
def child(module: str, config: str, *arguments: str) -> Iterator[_Child]:
    """Starts a module with this process's import path; its first input line is the configuration."""
    with (
        tempfile.NamedTemporaryFile(prefix="headrace-trial-") as output,
        subprocess.Popen(
            [sys.executable, "-m", module, output.name, *arguments],
            stdin=subprocess.PIPE,
            stdout=2,
            env=os.environ | {"PYTHONPATH": python_path(), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=set_parent_death_signal(),
        ) as process,
    ):
        try:
            assert process.stdin is not None
            process.stdin.write(config.encode() + b"\n")
            process.stdin.flush()
            yield _Child(process, Path(output.name))
        finally:
            process.kill()
