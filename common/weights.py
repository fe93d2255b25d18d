"""Weight versions as files: a manifest beside safetensors, verified by checksum before anything uses them.

A version is a folder with `manifest.json` and the files it lists. It is written aside, fsynced and renamed, so
a folder that exists is whole; `MODEL_FILE` is what an engine loads. Imports no torch.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.safetensors"


class WeightsError(RuntimeError):
    """A version's bytes are not what its manifest says."""


class TensorEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]


class FileEntry(msgspec.Struct, frozen=True):
    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a version consists of. `step` made it; `lineage` names the run and the learner's epoch."""

    version: int
    step: int
    lineage: str
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    schema: int = 1

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.files.values())


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest)


def decode_manifest(payload: bytes, sha256: str) -> Manifest:
    """Raises `WeightsError` unless the bytes are a manifest with that SHA-256 and safe file names."""
    found = hashlib.sha256(payload).hexdigest()
    if found != sha256:
        raise WeightsError(f"manifest has SHA-256 {found[:12]}…, expected {sha256[:12]}…")
    manifest = msgspec.json.decode(payload, type=Manifest)
    for name in manifest.files:
        if name in ("", ".", "..") or Path(name).name != name:
            raise WeightsError(f"manifest of version {manifest.version} names a file {name!r}")
    return manifest


def file_entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(num_bytes=file.tell(), sha256=digest.hexdigest())


def verify(folder: Path, manifest: Manifest) -> None:
    """Raises `WeightsError` unless every file of the manifest is in `folder` with its size and checksum."""
    for name, expected in manifest.files.items():
        found = file_entry(folder / name)
        if found != expected:
            raise WeightsError(
                f"version {manifest.version}, {name}: {found.num_bytes} bytes with SHA-256 {found.sha256[:12]}…, "
                f"expected {expected.num_bytes} with {expected.sha256[:12]}…"
            )


def version_folder(root: Path, version: int) -> Path:
    return root / f"v{version:08d}"


def stored_versions(root: Path) -> Iterator[int]:
    """The whole versions under `root`, in no order."""
    for folder in root.glob("v*"):
        if folder.name[1:].isdigit() and (folder / MANIFEST_FILE).is_file():
            yield int(folder.name[1:])


def delete_versions_but(root: Path, num_kept: int) -> None:
    for version in sorted(stored_versions(root))[:-num_kept]:
        shutil.rmtree(version_folder(root, version), ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into_place(aside: Path, final: Path) -> None:
    """Makes a folder that was written aside durable, under its final name, in place of what was there."""
    for path in aside.iterdir():
        fsync_path(path)
    fsync_path(aside)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    fsync_path(final.parent)
