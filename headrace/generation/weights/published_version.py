"""The newest weight version as published in Redis, and where its files can be fetched from."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import redis.asyncio

from headrace.common.hardware.device import machine_id
from headrace.common.weights.files import WeightsError
from headrace.common.weights.memory_folder import LOCK_FILE
from headrace.generation.weights.downloads import file_source

MAX_QUOTED_CHARS = 500
_FIELDS = ("version", "sha256", "url", "machine", "folder", "memory")


class PublishedVersion(NamedTuple):
    """The fields of the newest version in Redis."""

    version: int
    sha256: str
    """Of the manifest."""
    url: str
    """The learner's HTTP API, which serves the files."""
    machine: str = ""
    """The learner's machine (`machine_id`), where `folder` and `memory` are."""
    folder: str = ""
    """The learner's folder of versions."""
    memory: str = ""
    """The learner's memory-backed folder, which may have model files."""

    @property
    def is_on_this_machine(self) -> bool:
        """Whether the learner is on this machine."""
        return bool(self.machine) and self.machine == machine_id()

    def shares_memory_with(self, folder: Path) -> bool:
        """Whether a file in the learner's memory can be hard-linked into `folder`, without a copy; this is tried."""
        probe = folder / "probe"
        with contextlib.suppress(OSError):
            if self.is_on_this_machine and self.memory:
                os.link(Path(self.memory) / LOCK_FILE, probe)
                probe.unlink()
                return True
        return False

    def sources(self, peers: Sequence[str]) -> list[str]:
        """Where to ask for the files, in order: the learner's folder if it is on this machine, `peers`, the learner."""
        here = [file_source(Path(self.folder))] if self.is_on_this_machine and Path(self.folder).is_dir() else []
        return list(dict.fromkeys([*here, *peers, self.url]))


async def read_newest_version(client: redis.asyncio.Redis, key: str) -> PublishedVersion | None:
    """Returns None before the first version, and after Redis has lost it. Raises `WeightsError` on invalid fields."""
    values = await client.hmget(key, _FIELDS)
    if not any(values):
        return None
    fields = {name: (value or b"").decode(errors="replace") for name, value in zip(_FIELDS, values, strict=True)}
    if not re.fullmatch("[1-9][0-9]{0,15}", fields["version"]) or not fields["sha256"] or not fields["url"]:
        found = str(fields)[:MAX_QUOTED_CHARS]
        raise WeightsError(f"the newest version in Redis is {found}: expected a number, a SHA-256 and a URL")
    return PublishedVersion(int(fields["version"]), *(fields[name] for name in _FIELDS[1:]))
