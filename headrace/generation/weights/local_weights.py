"""A replica's own copy of the weights, in a memory-backed folder if the machine has one.

A new version is built beside the one that is served, tensor by tensor, and each resulting tensor is compared with its
digest. So the engine finds a whole file, and a bad delta does no harm. Folders are named by version and also serve
other replicas: the newest version as a whole model, earlier ones by manifest and delta, as long as those are small.
Folders of dead processes are deleted at the start.
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
    FileLayout,
    Manifest,
    WeightsError,
    check_tensor,
    model_layout,
    stored_versions,
    version_folder,
)
from headrace.common.weights.memory_folder import MemoryFolder, memory_backed_folder
from headrace.generation.weights.free_space import allocate

PREFIX = "headrace-weights-"
RETAINED_DELTA_SHARE = 0.5
"""Earlier deltas are kept for other replicas up to this share of the model's bytes."""


class LocalVersion(NamedTuple):
    """A version whose whole model is in the replica's folder."""

    manifest: Manifest
    sha256: str


class LocalWeights:
    """The replica's versions on this machine; `current` is the one that is served, None before the first."""

    def __init__(self, model_folder: Path) -> None:
        self.model_folder = model_folder
        self.current: LocalVersion | None = None
        self._memory = MemoryFolder(PREFIX, memory_backed_folder())
        self.root = self._memory.root

    def folder_of(self, version: int) -> Path:
        return version_folder(self.root, version)

    @property
    def current_folder(self) -> Path:
        return self.folder_of(self.current.manifest.version) if self.current else self.model_folder

    def build_from_deltas(self, base_file: Path, manifests: Sequence[Manifest]) -> None:
        """Builds the model file of the last of `manifests` in its folder: applies the deltas of all to `base_file`.

        `base_file` is the model file of the first manifest's base. If it is in the same folder, it was fetched for this
        only and is changed in place, so that there is never more than one version beside the served one. Raises
        `WeightsError` if the result does not match the last manifest or does not fit into the folder.
        """
        newest = manifests[-1]
        unfinished = self.folder_of(newest.version) / f"{MODEL_FILE}.unfinished"
        is_copied = base_file.parent != unfinished.parent
        base, layout = _mapped(base_file), model_layout(newest.tensors)
        _check_layout(base_file, base, newest, layout)
        files = [_mapped(self.folder_of(manifest.version) / DELTA_FILE) for manifest in manifests]
        deltas = [(manifest.delta, file) for manifest, file in zip(manifests, files, strict=True) if manifest.delta]
        patches_of = [(delta.patches, file, delta.slices()) for delta, file in deltas]
        if is_copied:
            result = allocate(unfinished, len(base))
            result[: len(layout.header)] = base[: len(layout.header)]
        else:
            result = np.memmap(base_file.rename(unfinished), np.uint8, "r+")
        for name, span in layout.slices.items():
            if is_copied:
                result[span] = base[span]
            bits = bits_of(result[span], ITEM_BYTES[newest.tensors[name].dtype])
            for patches, content, spans in patches_of:
                try:
                    apply_patch(patches[name], content[spans[name]].data, bits, bits)
                except DeltaError as error:
                    raise WeightsError(f"version {newest.version}, tensor {name}: {error}") from error
            check_tensor(name, newest.tensors[name], result[span].data)
        unfinished.rename(unfinished.with_name(MODEL_FILE))

    def activate(self, fetched: LocalVersion) -> None:
        """Makes `fetched` the served version, and deletes files of earlier versions that are no longer needed."""
        self.current = fetched
        newest = fetched.manifest.version
        left_bytes = fetched.manifest.num_model_bytes * RETAINED_DELTA_SHARE
        for version in sorted(stored_versions(self.root), reverse=True):
            folder = self.folder_of(version)
            delta = folder / DELTA_FILE
            left_bytes -= delta.stat().st_size if delta.exists() else 0
            if version > newest or (version < newest and left_bytes < 0):
                shutil.rmtree(folder, ignore_errors=True)
            elif version < newest:
                (folder / MODEL_FILE).unlink(missing_ok=True)

    def drop(self, version: int) -> None:
        """Deletes the files of a version that is not served."""
        shutil.rmtree(self.folder_of(version), ignore_errors=True)

    def link_config_and_tokenizer(self, version: int) -> None:
        """Links the configuration and the tokenizer into the version's folder; versions do not include them."""
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
    for name, place in layout.slices.items():
        check_tensor(name, manifest.tensors[name], content[place].data)


def check_delta(path: Path, delta: Delta) -> None:
    """Raises `WeightsError` unless the file has the delta's bytes."""
    found = blake3(_mapped(path).data).hexdigest()
    if found != delta.blake3:
        raise WeightsError(f"{path.name}: BLAKE3 {found[:12]}…, expected {delta.blake3[:12]}…")


def _check_layout(path: Path, content: Bytes, manifest: Manifest, layout: FileLayout) -> None:
    if len(content) != layout.num_bytes or content[: len(layout.header)].tobytes() != layout.header:
        raise WeightsError(f"{path.name} is not laid out as the manifest of version {manifest.version} says")


def _mapped(path: Path) -> Bytes:
    """The file's bytes, memory-mapped for reading."""
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
