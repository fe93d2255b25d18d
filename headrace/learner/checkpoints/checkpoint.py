"""Checkpoints: what a learner needs to go on as if it had never stopped, durable before anyone relies on it.

A checkpoint is a folder of safetensors (float32 masters, moments, random state: one file for each rank) and a record,
written aside under the learner's own name, fsynced and renamed; nothing is ever written over. Two are kept: checkpoint
N deletes from Redis what N-1 recorded, so that a corrupt newest one loses nothing.
"""

import contextlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from headrace.common.process.atomic_files import FileEntry, file_entry, publish_atomically
from headrace.learner.checkpoints.record import (
    Record,
    Unreadable,
    checkpoint_folders,
    folder_name,
    read_record,
    write_record,
)

NUM_KEPT = 2
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it stand."""


def save_checkpoint(
    root: Path,
    record: Record,
    write_state: Callable[[Path], dict[str, FileEntry]],
    check: Callable[[], None] = lambda: None,
) -> Path:
    """`write_state` puts the tensors into a folder, in files that it names; `check` is called just before the rename
    and may raise. Raises `CheckpointError` if the disk refuses."""
    aside = root / f"aside-{record.epoch:06d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write_record(aside, msgspec.structs.replace(record, files=write_state(aside)))
        check()
        final = root / folder_name(record.epoch, _next_number(root, record.epoch))
        publish_atomically(aside, final)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{root}: {error}") from error
    for folder in checkpoint_folders(root)[:-NUM_KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
    return final


def num_bytes_in(checkpoint: Path) -> int:
    """0 if a successor has taken it away."""
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in checkpoint.iterdir())
    return 0


def newest(root: Path) -> tuple[Record, Path] | None:
    """The newest checkpoint that can be read, and its folder; None if there is none yet.

    An unreadable one is reported, renamed and passed over. Raises `ValueError` if all are unreadable: a run never
    silently begins anew.
    """
    folders = checkpoint_folders(root)
    problems = []
    for folder in reversed(folders):
        try:
            record = read_record(folder)
            for name, expected in record.files.items():
                if file_entry(folder / name) != expected:
                    raise Unreadable(f"{folder.name}: {name} is not what was written")
        except (OSError, Unreadable) as error:
            _log.error("checkpoint %s is unreadable, taking the one before: %s", folder.name, error)
            problems.append((folder, str(error)))
            continue
        for unreadable, _ in problems:  # out of the way, or it would count as one of the two that are kept
            unreadable.rename(root / f"unreadable-{unreadable.name}")
        return record, folder
    if problems:
        raise ValueError(f"no checkpoint in {root} can be read: " + "; ".join(problem for _, problem in problems))
    return None


def _next_number(root: Path, epoch: int) -> int:
    own = [folder for folder in checkpoint_folders(root) if folder.name.startswith(f"checkpoint-{epoch:06d}-")]
    return int(own[-1].name.rpartition("-")[2]) + 1 if own else 1
