"""Atomic folders, whole or absent even after a kill: written under another name, fsynced, renamed."""

import hashlib
import os
import shutil
from pathlib import Path

import msgspec


class FileEntry(msgspec.Struct, frozen=True):
    num_bytes: int
    sha256: str


def file_entry(path: Path) -> FileEntry:
    """Size and digest of the file."""
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


def publish_atomically(staging: Path, final: Path) -> None:
    """Fsyncs the folder `staging` and its files, and renames it to `final`, replacing a folder of that name."""
    for path in staging.iterdir():
        fsync_path(path)
    fsync_path(staging)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    fsync_path(final.parent)
