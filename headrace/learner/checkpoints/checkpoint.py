"""Writes and finds checkpoints.

A checkpoint is a folder of safetensors (float32 masters, moments, random state; one file per rank) and a record. It is
written to a temporary folder of the learner's epoch, fsynced and renamed; nothing is ever overwritten. Two are kept:
checkpoint N deletes from Redis what N-1 recorded, so that nothing is lost if the newest one is corrupt.
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
    CheckpointRecord,
    UnreadableCheckpoint,
    checkpoint_folders,
    folder_name,
    read_record,
    write_record,
)

NUM_KEPT = 2
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are intact."""


def save_checkpoint(
    root: Path,
    record: CheckpointRecord,
    write_state: Callable[[Path], dict[str, FileEntry]],
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint and deletes all but the newest `NUM_KEPT`; returns its folder.

    `write_state` writes the tensors into the given folder and returns the files; `check` is called just before the
    rename and may raise. Raises `CheckpointError` if the disk refuses.
    """
    aside = root / aside_name(record.epoch)
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


def aside_name(epoch: int) -> str:
    """The name of the folder into which the learner of `epoch` writes. Names are in the order of epochs."""
    return f"aside-{epoch:06d}"


def num_bytes_in(checkpoint: Path) -> int:
    """The size of a checkpoint's files; 0 if a later one has deleted it."""
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in checkpoint.iterdir())
    return 0


def find_newest(root: Path) -> tuple[CheckpointRecord, Path] | None:
    """The newest checkpoint that can be read, and its folder; None if there is none yet.

    An unreadable one is logged, renamed and skipped. Raises `ValueError` if all are unreadable: a run never silently
    starts again from the beginning.
    """
    folders = checkpoint_folders(root)
    problems = []
    for folder in reversed(folders):
        try:
            record = read_record(folder)
            for name, expected in record.files.items():
                if file_entry(folder / name) != expected:
                    raise UnreadableCheckpoint(f"{folder.name}: {name} has another checksum than was recorded")
        except (OSError, UnreadableCheckpoint) as error:
            _log.error("checkpoint %s is unreadable, trying the one before it: %s", folder.name, error)
            problems.append((folder, str(error)))
            continue
        for unreadable, _ in problems:  # otherwise it would count as one of the two that are kept
            unreadable.rename(root / f"unreadable-{unreadable.name}")
        return record, folder
    if problems:
        raise ValueError(f"no checkpoint in {root} can be read: " + "; ".join(problem for _, problem in problems))
    return None


def _next_number(root: Path, epoch: int) -> int:
    own = [folder for folder in checkpoint_folders(root) if folder.name.startswith(f"checkpoint-{epoch:06d}-")]
    return int(own[-1].name.rpartition("-")[2]) + 1 if own else 1
