"""A checkpoint's record: the run's step, the data cursor, and the final state of each ticket. Imports no torch.

A record contains its own SHA-256 and the checksums of the files beside it. Checkpoints are ordered by the learner's
epoch, then by number, so that a checkpoint of a fenced learner is never taken for the newest.
"""

import hashlib
import re
from pathlib import Path

import msgspec

from headrace.common.process.atomic_files import FileEntry
from headrace.common.wire.desired_state import Settings
from headrace.learner.algorithm.guard import GuardState
from headrace.learner.intake.data_fingerprint import Fingerprint
from headrace.learner.store.structs import Cursor, Settlement

RECORD_FILE = "record.json"
MAX_VERSION_STEPS = 4096
"""Number of versions whose steps are recorded; groups of older versions cannot be in flight any more."""


class UnreadableCheckpoint(RuntimeError):
    """A checkpoint's contents do not match its checksums, or cannot be read."""


class RedisLoss(msgspec.Struct, frozen=True):
    """Redis lost all its data, and the run went on from its checkpoint of `step`."""

    step: int
    num_reissued: int
    """Number of tickets that were unfinished at that checkpoint and were issued again; only work on them was lost."""
    forgotten: dict[str, int]
    """Number of finished tickets by state that the ledger has no entries for any more."""
    time_s: float


class CheckpointRecord(msgspec.Struct, frozen=True):
    """A checkpoint without its tensors.

    A field that older records lack has a default, and older learners ignore it. Any other change of the layout needs
    another `schema`.
    """

    epoch: int
    """The fencing epoch of the learner that wrote it."""
    step: int
    version: int
    cursor: Cursor
    version_steps: dict[int, int]
    settlements: list[Settlement]
    """How the groups consumed since the checkpoint before were settled; these stay in Redis until the next one."""
    earlier: list[Settlement]
    """The settlements of the checkpoint before; their groups can be deleted from Redis once this one is durable."""
    unfinished: list[str]
    """Training tickets without a settlement, and replacements of stale ones that were still to be issued."""
    counts: dict[str, int]
    """Number of tickets by state, and other totals of the run."""
    wall_s: float
    """Seconds from the first ticket to this checkpoint, over all starts of the run."""
    losses: list[RedisLoss] = []
    settings: Settings = Settings()
    """The settings that differ from the configuration because they were changed during the run."""
    guard: GuardState = GuardState()
    data: Fingerprint | None = None
    """The fingerprint of the data that the cursor points into."""
    files: dict[str, FileEntry] = {}
    schema: int = 2


class _Sealed(msgspec.Struct):
    sha256: str
    record: msgspec.Raw


def write_record(folder: Path, record: CheckpointRecord) -> None:
    content = msgspec.json.encode(record)
    sealed = _Sealed(hashlib.sha256(content).hexdigest(), msgspec.Raw(content))
    (folder / RECORD_FILE).write_bytes(msgspec.json.encode(sealed))


def read_record(folder: Path) -> CheckpointRecord:
    """Raises `UnreadableCheckpoint`."""
    try:
        sealed = msgspec.json.decode((folder / RECORD_FILE).read_bytes(), type=_Sealed)
        content = bytes(sealed.record)
        if hashlib.sha256(content).hexdigest() != sealed.sha256:
            raise UnreadableCheckpoint(f"{folder.name}: the record does not match its checksum")
        return msgspec.json.decode(content, type=CheckpointRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise UnreadableCheckpoint(f"{folder.name}: {error}") from error


def newest_record(root: Path) -> CheckpointRecord | None:
    """The record of the newest checkpoint whose record can be read; reads no tensors and changes nothing."""
    for folder in reversed(checkpoint_folders(root)):
        try:
            return read_record(folder)
        except UnreadableCheckpoint:
            continue
    return None


def folder_name(epoch: int, number: int) -> str:
    return f"checkpoint-{epoch:06d}-{number:06d}"


def checkpoint_folders(root: Path) -> list[Path]:
    """The folders of all checkpoints, from the oldest to the newest."""
    return sorted(folder for folder in root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+-\d+", folder.name))
