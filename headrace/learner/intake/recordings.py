"""Recordings: the groups of a run in the order in which replicas committed them, to be trained on again.

A file of frames (4 bytes of length, then msgpack): a header with the run's configuration, then groups as they stood
in Redis, each after the versions that it may name. A frame that was cut off by a kill is no frame. Replayed into a
learner, a recording gives the same steps, bit for bit, however often that learner is killed.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace.common.config import RunConfig
from headrace.common.wire import Ticket
from headrace.learner.intake.group_source import IssueResult
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor

SCHEMA = 2
"""Since groups are of schema 2."""
_LENGTH = struct.Struct("<I")


class Header(msgspec.Struct, tag="header"):
    run: str
    config: dict[str, Any]
    schema: int = SCHEMA


class KnownVersion(msgspec.Struct, tag="version"):
    version: int
    step: int


class RecordedGroup(msgspec.Struct, tag="group"):
    entry_id: str
    ticket_id: str
    payload: bytes


Frame = Header | KnownVersion | RecordedGroup
_decoder = msgspec.msgpack.Decoder(Frame)


class Recording:
    """One file, its payloads left on disk. Raises `ValueError` if it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version_steps: dict[int, int] = {}
        self.last_entry_id = "0"
        self.num_bytes = 0
        """Of whole frames."""
        self._offsets: list[int] = []
        header = None
        for offset, frame, end in _frames(path):
            self.num_bytes = end
            if isinstance(frame, Header):
                header = frame
            elif isinstance(frame, KnownVersion):
                self.version_steps[frame.version] = frame.step
            else:
                self._offsets.append(offset)
                self.last_entry_id = frame.entry_id
        if header is None or header.schema != SCHEMA:
            raise ValueError(f"{path}: expected a recording of schema {SCHEMA}, made by `headrace record`")
        self.run, self.config = header.run, header.config

    @property
    def num_groups(self) -> int:
        return len(self._offsets)

    def groups(self, places: Iterable[int]) -> list[tuple[str, bytes]]:
        """Ticket ids and payloads of the groups at `places`."""
        found = []
        with self.path.open("rb") as file:
            for place in places:
                file.seek(self._offsets[place])
                (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
                frame = _decoder.decode(file.read(length))
                assert isinstance(frame, RecordedGroup)
                found.append((frame.ticket_id, frame.payload))
        return found


class RecordingWriter:
    """Appends to a recording; what a killed writer left half written is cut off."""

    def __init__(self, path: Path, header: Header) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists() or path.stat().st_size == 0
        earlier = None if is_new else Recording(path)
        self.last_entry_id = earlier.last_entry_id if earlier else "0"
        self.num_groups = earlier.num_groups if earlier else 0
        self._versions = dict(earlier.version_steps) if earlier else {}
        self._file = path.open("ab")
        if earlier is None:
            self._write(header)
        else:
            os.truncate(path, earlier.num_bytes)

    def know(self, version_steps: dict[int, int]) -> None:
        for version, step in version_steps.items():
            if version not in self._versions:
                self._versions[version] = step
                self._write(KnownVersion(version, step))

    def add(self, group: RecordedGroup) -> None:
        self._write(group)
        self.last_entry_id = group.entry_id
        self.num_groups += 1

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, frame: Frame) -> None:
        content = msgspec.msgpack.encode(frame)
        self._file.write(_LENGTH.pack(len(content)) + content)


class RecordingSource:
    """A learner's source of groups that asks nobody; its cursor is a place in the recording."""

    is_recording = True
    data = None

    def __init__(self, recording: Recording, cursor: Cursor) -> None:
        self.recording = recording
        self.cursor = cursor
        self.is_exhausted = False
        self._again: list[int] = []

    def configure(self, config: RunConfig) -> None:
        """What was recorded was sampled as it was."""

    def issue(self, store: LearnerStore, count: int, step: int, version: int) -> IssueResult:
        again, self._again = self._again[:count], self._again[count:]
        last = min(self.cursor.position + count - len(again), self.recording.num_groups)
        groups = self.recording.groups([*again, *range(self.cursor.position, last)])
        self.is_exhausted = not groups
        if groups:
            self.cursor = Cursor(0, last)
            store.add_groups(groups, self.cursor)
        return IssueResult([ticket_id for ticket_id, _ in groups])

    def replace_stale(self, ticket: Ticket) -> None:
        """What replaced it then, if anything did, comes later in the recording."""

    def issue_again(self, ticket_ids: Sequence[str]) -> None:
        """Groups that Redis has lost."""
        wanted = set(ticket_ids)
        names = self.recording.groups(range(self.recording.num_groups)) if wanted else []
        self._again = [place for place, (ticket_id, _) in enumerate(names) if ticket_id in wanted]

    def ids_to_issue(self) -> list[str]:
        return []

    def rebuild(self, ticket_ids: Sequence[str], step: int, version: int) -> list[Ticket]:
        raise ValueError(f"tickets {', '.join(ticket_ids)}: a recording issues none")

    def evaluation_tickets(self, step: int, version: int) -> list[Ticket]:
        raise AssertionError("a recording is not evaluated")


def _frames(path: Path) -> Iterator[tuple[int, Frame, int]]:
    """Offset, frame, and the offset behind it. Raises `ValueError`."""
    try:
        with path.open("rb") as file:
            while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
                (length,) = _LENGTH.unpack(head)
                content = file.read(length)
                if len(content) < length:
                    return
                yield file.tell() - length - _LENGTH.size, _decoder.decode(content), file.tell()
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{path}: not a recording: {error}") from error
