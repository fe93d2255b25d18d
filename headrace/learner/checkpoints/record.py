"""What a checkpoint says of the run: its step, the data's cursor, and what became of which ticket. No torch here.

A record is sealed by its SHA-256 and names the checksums of the files beside it. Checkpoints are ordered by the
learner's epoch, then by number: what a fenced learner still writes never passes for the newest.
"""

import hashlib
import re
from pathlib import Path

import msgspec

from headrace.common.process.atomic_files import FileEntry
from headrace.common.wire.desired_state import Settings
from headrace.learner.algorithm.guard import GuardState
from headrace.learner.intake.data_fingerprint import Fingerprint
from headrace.learner.store.store import Cursor, Settlement

RECORD_FILE = "record.json"
MAX_VERSION_STEPS = 4096
"""Of older versions nothing can be in flight any more."""


class Unreadable(RuntimeError):
    """A checkpoint's bytes are not what was written."""


class Loss(msgspec.Struct, frozen=True):
    """Redis lost everything, and this run went on from its checkpoint of `step`."""

    step: int
    num_reissued: int
    """Tickets that were open or queued at that checkpoint, issued anew: the work on them was lost, they were not."""
    forgotten: dict[str, int]
    """Finished tickets by state that the ledger has no marks of any more."""
    time_s: float


class Record(msgspec.Struct, frozen=True):
    """Everything of a checkpoint but the tensors.

    A field that older records lack has a default, and older learners pass it over; any other change of the layout needs
    another `schema`."""

    epoch: int
    """Of the learner that wrote it."""
    step: int
    version: int
    cursor: Cursor
    version_steps: dict[int, int]
    settlements: list[Settlement]
    """What became of the groups consumed since the checkpoint before; they stay in Redis until the next one."""
    earlier: list[Settlement]
    """What the checkpoint before recorded: may leave Redis as soon as this one is durable."""
    unfinished: list[str]
    """Training tickets that were open or queued, and replacements of stale ones that were still to be issued."""
    counts: dict[str, int]
    wall_s: float
    """From the first ticket to this checkpoint, over all lives of the run."""
    losses: list[Loss] = []
    settings: Settings = Settings()
    """What differed from the configuration, as ordered."""
    guard: GuardState = GuardState()
    data: Fingerprint | None = None
    """What the cursor is a place of."""
    files: dict[str, FileEntry] = {}
    schema: int = 2


class _Sealed(msgspec.Struct):
    sha256: str
    record: msgspec.Raw


def write_record(folder: Path, record: Record) -> None:
    content = msgspec.json.encode(record)
    sealed = _Sealed(hashlib.sha256(content).hexdigest(), msgspec.Raw(content))
    (folder / RECORD_FILE).write_bytes(msgspec.json.encode(sealed))


def read_record(folder: Path) -> Record:
    """Raises `Unreadable`."""
    try:
        sealed = msgspec.json.decode((folder / RECORD_FILE).read_bytes(), type=_Sealed)
        content = bytes(sealed.record)
        if hashlib.sha256(content).hexdigest() != sealed.sha256:
            raise Unreadable(f"{folder.name}: the record is not what was written")
        return msgspec.json.decode(content, type=Record)
    except (OSError, msgspec.DecodeError) as error:
        raise Unreadable(f"{folder.name}: {error}") from error


def newest_record(root: Path) -> Record | None:
    """Of the newest checkpoint whose record can be read; looks at no tensors, and changes nothing."""
    for folder in reversed(checkpoint_folders(root)):
        try:
            return read_record(folder)
        except Unreadable:
            continue
    return None


def folder_name(epoch: int, number: int) -> str:
    return f"checkpoint-{epoch:06d}-{number:06d}"


def checkpoint_folders(root: Path) -> list[Path]:
    """From the oldest to the newest."""
    return sorted(folder for folder in root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+-\d+", folder.name))
