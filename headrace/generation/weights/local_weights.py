"""A replica's own copy of the weights, in a memory-backed folder where there is one.

A new version is built beside the one that is served, tensor by tensor, and every tensor that results is held against
its digest; so the engine finds a whole file, and a delta that went wrong costs nothing. Folders are named by version
and serve other replicas, too: the newest whole, earlier ones by their manifest and delta for as long as these are few
bytes. What processes that are gone have left behind is cleared away at the start.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from headrace.common.weights.delta import Bytes, DeltaError, apply_patch, bits_of
from headrace.common.weights.files import (
    DELTA_FILE,
    ITEM_BYTES,
    MODEL_FILE,
    Delta,
    Layout,
    Manifest,
    WeightsError,
    check_tensor,
    model_layout,
    stored_versions,
    version_folder,
)
from headrace.common.weights.memory_folder import MemoryFolder, memory_backed
from headrace.generation.weights.free_space import allocate

PREFIX = "headrace-weights-"
RETAINED_DELTA_SHARE = 0.5
"""Of the model's bytes: so many bytes of earlier deltas are kept for other replicas."""


class LocalVersion(NamedTuple):
    """A version that is here whole."""

    manifest: Manifest
    sha256: str


class LocalWeights:
    """`held` is the version that is served, None before the first."""

    def __init__(self, model_folder: Path) -> None:
        self.model_folder = model_folder
        self.current: LocalVersion | None = None
        self._memory = MemoryFolder(PREFIX, memory_backed())
        self.root = self._memory.root

    def folder_of(self, version: int) -> Path:
        return version_folder(self.root, version)

    @property
    def current_folder(self) -> Path:
        return self.folder_of(self.current.manifest.version) if self.current else self.model_folder

    def build_from_deltas(self, start: Path, manifests: Sequence[Manifest]) -> None:
        """Makes the model's file of the last of `manifests`, in its folder, out of `start`, the model's file of the
        first one's base, and the delta of each. Raises `WeightsError` if it does not become what the last one says, or
        if there is no room for it. A `start` in that folder was fetched for this alone, and becomes it: beside the
        served version there is never more than one.
        """
        newest = manifests[-1]
        aside = self.folder_of(newest.version) / f"{MODEL_FILE}.aside"
        is_copied = start.parent != aside.parent
        begun, layout = _mapped(start), model_layout(newest.tensors)
        _check_layout(start, begun, newest, layout)
        files = [_mapped(self.folder_of(manifest.version) / DELTA_FILE) for manifest in manifests]
        deltas = [(manifest.delta, file) for manifest, file in zip(manifests, files, strict=True) if manifest.delta]
        frames = [(delta.patches, file, delta.places()) for delta, file in deltas]
        if is_copied:
            out = allocate(aside, len(begun))
            out[: len(layout.header)] = begun[: len(layout.header)]
        else:
            out = np.memmap(start.rename(aside), np.uint8, "r+")
        for name, place in layout.places.items():
            if is_copied:
                out[place] = begun[place]
            bits = bits_of(out[place], ITEM_BYTES[newest.tensors[name].dtype])
            for patches, content, places in frames:
                try:
                    apply_patch(patches[name], content[places[name]].data, bits, bits)
                except DeltaError as error:
                    raise WeightsError(f"version {newest.version}, tensor {name}: {error}") from error
            check_tensor(name, newest.tensors[name], out[place].data)
        aside.rename(aside.with_name(MODEL_FILE))

    def activate(self, held: LocalVersion) -> None:
        """The version in its folder takes the place of the one that was served."""
        self.current = held
        newest = held.manifest.version
        left_bytes = held.manifest.num_model_bytes * RETAINED_DELTA_SHARE
        for version in sorted(stored_versions(self.root), reverse=True):
            folder = self.folder_of(version)
            delta = folder / DELTA_FILE
            left_bytes -= delta.stat().st_size if delta.exists() else 0
            if version > newest or (version < newest and left_bytes < 0):
                shutil.rmtree(folder, ignore_errors=True)
            elif version < newest:
                (folder / MODEL_FILE).unlink(missing_ok=True)

    def drop(self, version: int) -> None:
        """What was fetched or built of a version that is not served."""
        shutil.rmtree(self.folder_of(version), ignore_errors=True)

    def link_config_and_tokenizer(self, version: int) -> None:
        """The configuration and the tokenizer, which no version brings."""
        folder = self.folder_of(version)
        for path in self.model_folder.iterdir():
            is_weights = path.suffix in (".safetensors", ".bin") or path.name == f"{MODEL_FILE}.index.json"
            if path.is_file() and not is_weights:
                (folder / path.name).symlink_to(path.resolve())

    def close(self) -> None:
        self._memory.close()


def check_model(path: Path, manifest: Manifest) -> None:
    """Raises `WeightsError` unless the file is the whole model of the version."""
    content, layout = _mapped(path), model_layout(manifest.tensors)
    _check_layout(path, content, manifest, layout)
    for name, place in layout.places.items():
        check_tensor(name, manifest.tensors[name], content[place].data)


def check_delta(path: Path, delta: Delta) -> None:
    """Raises `WeightsError` unless the file has the delta's bytes."""
    found = blake3(_mapped(path).data).hexdigest()
    if found != delta.blake3:
        raise WeightsError(f"{path.name}: BLAKE3 {found[:12]}…, expected {delta.blake3[:12]}…")


def _check_layout(path: Path, content: Bytes, manifest: Manifest, layout: Layout) -> None:
    if len(content) != layout.num_bytes or content[: len(layout.header)].tobytes() != layout.header:
        raise WeightsError(f"{path.name} is not laid out as version {manifest.version} says")


def _mapped(path: Path) -> Bytes:
    """The file's bytes, read as they are looked at."""
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
