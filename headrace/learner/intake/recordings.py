"""The file format of recordings: the groups of a run in the order in which replicas committed them.

A recording is a file of frames (4 bytes of length, then msgpack): a header with the run's configuration, then groups as
they were in Redis, each after the versions that it may name. A frame that a kill cut off is ignored. Replayed into a
learner, a recording gives the same steps, bit for bit, however often that learner is killed.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from headrace.common.wire.structs import GROUP_SCHEMA, READABLE_GROUP_SCHEMAS

_LENGTH = struct.Struct("<I")


class Header(msgspec.Struct, tag="header"):
    run: str
    config: dict[str, Any]
    schema: int = GROUP_SCHEMA
    """Of the groups in it."""


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
    """Reads one file; payloads stay on disk until asked for. Raises `ValueError` if it is not a recording."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version_steps: dict[int, int] = {}
        self.last_entry_id = "0"
        self.num_bytes = 0
        """The length of the whole frames."""
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
        if header is None or header.schema not in READABLE_GROUP_SCHEMAS:
            schemas = " or ".join(map(str, READABLE_GROUP_SCHEMAS))
            raise ValueError(f"{path}: expected a recording of schema {schemas}, made by `headrace record`")
        self.run, self.config = header.run, header.config

    @property
    def num_groups(self) -> int:
        return len(self._offsets)

    def groups(self, indices: Iterable[int]) -> list[tuple[str, bytes]]:
        """Ticket ids and payloads of the groups at `indices`."""
        found = []
        with self.path.open("rb") as file:
            for index in indices:
                file.seek(self._offsets[index])
                (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
                frame = _decoder.decode(file.read(length))
                assert isinstance(frame, RecordedGroup)
                found.append((frame.ticket_id, frame.payload))
        return found


class RecordingWriter:
    """Appends to a recording; cuts off a frame that a killed writer left incomplete."""

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

    def add_versions(self, version_steps: dict[int, int]) -> None:
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


def _frames(path: Path) -> Iterator[tuple[int, Frame, int]]:
    """Yields offset, frame, and the offset after it. Raises `ValueError`."""
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
