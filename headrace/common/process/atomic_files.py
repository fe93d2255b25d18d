"""Files that are whole or not there, also after a kill: written aside, fsynced, renamed."""

import hashlib
import os
import shutil
from pathlib import Path

import msgspec


class FileEntry(msgspec.Struct, frozen=True):
    num_bytes: int
    sha256: str


def file_entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(num_bytes=file.tell(), sha256=digest.hexdigest())


def fsync_path(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_atomically(aside: Path, final: Path) -> None:
    """Makes a folder that was written aside durable, under its final name, in place of what was there."""
    for path in aside.iterdir():
        fsync_path(path)
    fsync_path(aside)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    fsync_path(final.parent)
