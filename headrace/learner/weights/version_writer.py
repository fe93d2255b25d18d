"""Writes the files of weight versions: deltas against the version before, and anchors (whole models) when due.

Host memory keeps the copy that was published last, beside the one that is being written. An anchor is written when
there are `MAX_CHAIN` deltas since the last one, when these would cost a new replica more bytes than the model, or when
a delta would be too large. Several threads hash and encode tensors; they hold Python's lock only briefly.
"""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from blake3 import blake3

from headrace.common.process.atomic_files import publish_atomically
from headrace.common.weights.delta import Patch, bits_of, make_patch
from headrace.common.weights.files import (
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
    sha256_hex,
)
from headrace.learner.model.host_snapshots import Snapshot, bytes_of

MAX_CHAIN = 32
"""Maximum number of deltas between two anchors."""
MAX_DELTA_SHARE = 0.9
"""A delta larger than this share of the model's bytes is not written."""
MAX_THREADS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


class _EncodedTensor(NamedTuple):
    """A tensor's manifest entry, and the patch that turns the base version's tensor into it."""

    name: str
    entry: TensorEntry
    patch: Patch
    frames: list[bytes]


class VersionWriter:
    """Writes successive versions of the same tensors with `num_threads` threads (default: half of the cores, at most
    eight)."""

    def __init__(self, lineage: str, num_threads: int | None = None) -> None:
        self.lineage = lineage
        self.num_threads = num_threads or min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))
        self.anchors: list[int] = []
        """WeightVersions, in their order, that a new replica could start from when they were new."""
        self._newest: tuple[Manifest, Snapshot] | None = None
        self._chain_bytes: list[int] = []
        """The size of each delta since the newest anchor."""
        self._is_anchored = False
        """Whether the newest anchor is durable."""

    def write(
        self,
        folder: Path,
        version: int,
        step: int,
        weights: Snapshot,
        memory: Path | None = None,
        *,
        is_memory_only: bool = False,
    ) -> Manifest:
        """Writes the version into `folder`; returns when it is durable. After an `OSError` the version before stays
        the base of the next one.

        With `memory`, a new folder in memory, the model file is written there and not to the disk. `is_memory_only`:
        every replica reads that file, so no delta is made.
        """
        aside = folder.with_name("aside")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        base = None if is_memory_only else self._newest
        entries, delta = self._write_delta(aside / DELTA_FILE, weights, base)
        is_anchor = self._is_anchor_due(delta, entries, is_durable=memory is None)
        manifest = Manifest(version, step, self.lineage, entries, has_model=is_anchor or memory is not None)
        if delta is not None and delta.num_bytes <= MAX_DELTA_SHARE * manifest.num_model_bytes:
            manifest = Manifest(version, step, self.lineage, entries, manifest.has_model, delta)
        else:
            (aside / DELTA_FILE).unlink()
        if manifest.has_model:
            _write_model((memory or aside) / MODEL_FILE, entries, weights)
        (aside / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        publish_atomically(aside, folder)
        if is_anchor or delta is None:
            self.anchors, self._is_anchored, self._chain_bytes = [*self.anchors, version], memory is None, []
        else:
            self._chain_bytes.append(delta.num_bytes)
        self._newest = manifest, weights
        return manifest

    def _write_delta(
        self, path: Path, weights: Snapshot, newest: tuple[Manifest, Snapshot] | None
    ) -> tuple[dict[str, TensorEntry], Delta | None]:
        """Writes the patches of all tensors to `path`; returns the manifest entries and, if there is a base, the
        delta."""
        base, base_weights = newest or (None, None)
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in weights.tensors.items()}
        entries: dict[str, TensorEntry] = {}
        patches: dict[str, Patch] = {}
        digest = blake3()

        def encode_tensor(name: str) -> _EncodedTensor:
            tensor, item_bytes = weights.tensors[name], ITEM_BYTES[dtypes[name]]
            content = bytes_of(tensor)
            entry = TensorEntry(dtypes[name], list(tensor.shape), blake3(content.data).hexdigest())
            if base_weights is None:
                return _EncodedTensor(name, entry, Patch("same"), [])
            base_content = bytes_of(base_weights.tensors[name])
            return _EncodedTensor(
                name, entry, *make_patch(bits_of(content, item_bytes), bits_of(base_content, item_bytes))
            )

        with path.open("wb") as file:
            for one in _map_in_order(encode_tensor, file_order(dtypes), self.num_threads):
                entries[one.name], patches[one.name] = one.entry, one.patch
                for frame in one.frames:
                    digest.update(frame)
                    file.write(frame)
        if base is None:
            return entries, None
        num_bytes = sum(patch.num_bytes for patch in patches.values())
        return entries, Delta(base.version, sha256_hex(encode_manifest(base)), num_bytes, digest.hexdigest(), patches)

    def _is_anchor_due(self, delta: Delta | None, entries: Mapping[str, TensorEntry], *, is_durable: bool) -> bool:
        if delta is None or len(self._chain_bytes) >= MAX_CHAIN or (is_durable and not self._is_anchored):
            return True
        return sum(self._chain_bytes) + delta.num_bytes > sum(entry.num_bytes for entry in entries.values())

    def newest_model_writer(self) -> Callable[[Path], None]:
        """Returns a function that writes the model file of the version that is the newest now; it may be called later,
        from any thread. While it is referenced, host memory may hold one more copy of the model."""
        assert self._newest is not None
        manifest, weights = self._newest
        return lambda path: _write_model(path, manifest.tensors, weights)


def _write_model(path: Path, entries: Mapping[str, TensorEntry], weights: Snapshot) -> None:
    with path.open("wb") as file:
        file.write(model_layout(entries).header)
        for name in entries:
            file.write(bytes_of(weights.tensors[name]).data)


def _map_in_order(act: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """`act` of each item, in their order, on `num_threads` threads; at most twice as many items are in progress."""
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="encode") as threads:
        for item in items:
            begun.append(threads.submit(act, item))
            if len(begun) > 2 * num_threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
