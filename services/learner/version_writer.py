"""Writes the files of weight versions: deltas against the version before, and an anchor now and then.

The learner keeps a copy of what it published last in host memory; only one tensor more is in memory while a version is
written. An anchor is written when the deltas since the last one would cost a joiner as many bytes as the model, or are
many, or when a delta would not pay.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from blake3 import blake3
from torch import Tensor

from common.delta import Bytes, Patch, bits_of, encode
from common.durable import move_into_place
from common.weights import (
    DELTA_FILE,
    ITEM_BYTES,
    MANIFEST_FILE,
    MODEL_FILE,
    Delta,
    Manifest,
    TensorEntry,
    encode_manifest,
    file_order,
    model_layout,
    sha256_of,
)

MAX_CHAIN = 32
"""Deltas between two anchors."""
LARGEST_DELTA = 0.9
"""Share of the model's bytes above which a delta does not pay."""


class Weight(Protocol):
    """A tensor, or what stands for one until `detach` makes it whole."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> torch.Size: ...
    def detach(self) -> Tensor: ...


class VersionWriter:
    """Writes version after version of the same tensors."""

    def __init__(self, lineage: str) -> None:
        self.lineage = lineage
        self._newest: Manifest | None = None
        self._content: dict[str, Bytes] = {}
        """The bytes of the newest version's tensors."""
        self._chain_bytes: list[int] = []
        """Of each delta since the newest anchor."""

    def write(self, folder: Path, version: int, step: int, tensors: Mapping[str, Weight]) -> Manifest:
        """Returns when `folder` has the version, durably. Raises `OSError` if the disk refuses; the next version is
        then an anchor without a base."""
        base, self._newest = self._newest, None
        aside = folder.with_name("aside")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        entries, delta = self._write_delta(aside / DELTA_FILE, tensors, base)
        manifest = Manifest(version, step, self.lineage, entries, has_model=self._is_anchor_due(delta, entries))
        if delta is not None and delta.num_bytes <= LARGEST_DELTA * manifest.num_model_bytes:
            manifest = Manifest(version, step, self.lineage, entries, manifest.has_model, delta)
        else:
            (aside / DELTA_FILE).unlink()
        if manifest.has_model:
            _write_model(aside / MODEL_FILE, entries, self._content)
        (aside / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        move_into_place(aside, folder)
        self._chain_bytes = [] if manifest.has_model or delta is None else [*self._chain_bytes, delta.num_bytes]
        self._newest = manifest
        return manifest

    def _write_delta(
        self, path: Path, tensors: Mapping[str, Weight], base: Manifest | None
    ) -> tuple[dict[str, TensorEntry], Delta | None]:
        """Every tensor on its way into `_content`: described, and what changes the base into it in the file."""
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        entries: dict[str, TensorEntry] = {}
        patches: dict[str, Patch] = {}
        digest = blake3()
        with path.open("wb") as file:
            for name in file_order(dtypes):
                content, item_bytes = _content_of(tensors[name]), ITEM_BYTES[dtypes[name]]
                entries[name] = TensorEntry(dtypes[name], list(tensors[name].shape), blake3(content.data).hexdigest())
                if base is not None:
                    bits, base_bits = bits_of(content, item_bytes), bits_of(self._content[name], item_bytes)
                    patches[name], frames = encode(bits, base_bits)
                    for frame in frames:
                        digest.update(frame)
                        file.write(frame)
                self._content[name] = content
        if base is None:
            return entries, None
        num_bytes = sum(patch.num_bytes for patch in patches.values())
        return entries, Delta(base.version, sha256_of(encode_manifest(base)), num_bytes, digest.hexdigest(), patches)

    def _is_anchor_due(self, delta: Delta | None, entries: Mapping[str, TensorEntry]) -> bool:
        if delta is None or len(self._chain_bytes) >= MAX_CHAIN:
            return True
        return sum(self._chain_bytes) + delta.num_bytes > sum(entry.num_bytes for entry in entries.values())

    def copy_of_newest(self) -> Callable[[Path], None]:
        """Writes the model's file as it is now, whenever it is called, from any thread: the bytes of a tensor are never
        changed in place. Until it is forgotten, host memory may hold the model twice."""
        assert self._newest is not None
        entries, content = self._newest.tensors, dict(self._content)
        return lambda path: _write_model(path, entries, content)


def _write_model(path: Path, entries: Mapping[str, TensorEntry], content: Mapping[str, Bytes]) -> None:
    with path.open("wb") as file:
        file.write(model_layout(entries).header)
        for name in entries:
            file.write(content[name].data)


def _content_of(weight: Weight) -> Bytes:
    """A copy of its bytes in host memory."""
    tensor = weight.detach()
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.copy_(tensor.reshape(-1))
    content: Bytes = flat.view(torch.uint8).numpy()
    return content
