"""Writes the files of weight versions: deltas against the version before, and an anchor now and then.

The copy of what was published last stays in host memory, beside the one that is being written. An anchor is written
when the deltas since the last one would cost a joiner as many bytes as the model, or are many, or when a delta would
not pay. Tensors are hashed and encoded by several threads, which hold Python's lock for moments only.
"""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from blake3 import blake3

from headrace.common.process.atomic_files import move_into_place
from headrace.common.weights.delta import Patch, bits_of, encode
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
    sha256_of,
)
from headrace.learner.model.host_snapshots import Snapshot, bytes_of

MAX_CHAIN = 32
"""Deltas between two anchors."""
LARGEST_DELTA = 0.9
"""Share of the model's bytes above which a delta does not pay."""
MAX_THREADS = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Encoded(NamedTuple):
    """A tensor, described, and what changes the base's into it."""

    name: str
    entry: TensorEntry
    patch: Patch
    frames: list[bytes]


class VersionWriter:
    """Writes version after version of the same tensors, by `num_threads` threads (default: half of the cores, eight at
    most)."""

    def __init__(self, lineage: str, num_threads: int | None = None) -> None:
        self.lineage = lineage
        self.num_threads = num_threads or min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))
        self.anchors: list[int] = []
        """Versions that a joiner could start from when they were new, in their order."""
        self._newest: tuple[Manifest, Snapshot] | None = None
        self._chain_bytes: list[int] = []
        """Of each delta since the newest anchor."""
        self._is_anchored = False
        """That anchor is durable."""

    def write(
        self,
        folder: Path,
        version: int,
        step: int,
        weights: Snapshot,
        memory: Path | None = None,
        *,
        alone: bool = False,
    ) -> Manifest:
        """Returns when `folder` has the version, durably. Raises `OSError` if the disk refuses; the version before is
        then the base of the next.

        With `memory`, a new folder in memory, the model's file is written there and never to the disk; `alone`: nobody
        needs anything else, and no delta is made.
        """
        aside = folder.with_name("aside")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        base = None if alone else self._newest
        entries, delta = self._write_delta(aside / DELTA_FILE, weights, base)
        is_anchor = self._is_anchor_due(delta, entries, is_durable=memory is None)
        manifest = Manifest(version, step, self.lineage, entries, has_model=is_anchor or memory is not None)
        if delta is not None and delta.num_bytes <= LARGEST_DELTA * manifest.num_model_bytes:
            manifest = Manifest(version, step, self.lineage, entries, manifest.has_model, delta)
        else:
            (aside / DELTA_FILE).unlink()
        if manifest.has_model:
            _write_model((memory or aside) / MODEL_FILE, entries, weights)
        (aside / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        move_into_place(aside, folder)
        if is_anchor or delta is None:
            self.anchors, self._is_anchored, self._chain_bytes = [*self.anchors, version], memory is None, []
        else:
            self._chain_bytes.append(delta.num_bytes)
        self._newest = manifest, weights
        return manifest

    def _write_delta(
        self, path: Path, weights: Snapshot, newest: tuple[Manifest, Snapshot] | None
    ) -> tuple[dict[str, TensorEntry], Delta | None]:
        """Every tensor, described, and what changes the base into them in the file."""
        base, base_weights = newest or (None, None)
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in weights.tensors.items()}
        entries: dict[str, TensorEntry] = {}
        patches: dict[str, Patch] = {}
        digest = blake3()

        def encoded(name: str) -> _Encoded:
            tensor, item_bytes = weights.tensors[name], ITEM_BYTES[dtypes[name]]
            content = bytes_of(tensor)
            entry = TensorEntry(dtypes[name], list(tensor.shape), blake3(content.data).hexdigest())
            if base_weights is None:
                return _Encoded(name, entry, Patch("same"), [])
            base_content = bytes_of(base_weights.tensors[name])
            return _Encoded(name, entry, *encode(bits_of(content, item_bytes), bits_of(base_content, item_bytes)))

        with path.open("wb") as file:
            for one in _in_order(encoded, file_order(dtypes), self.num_threads):
                entries[one.name], patches[one.name] = one.entry, one.patch
                for frame in one.frames:
                    digest.update(frame)
                    file.write(frame)
        if base is None:
            return entries, None
        num_bytes = sum(patch.num_bytes for patch in patches.values())
        return entries, Delta(base.version, sha256_of(encode_manifest(base)), num_bytes, digest.hexdigest(), patches)

    def _is_anchor_due(self, delta: Delta | None, entries: Mapping[str, TensorEntry], *, is_durable: bool) -> bool:
        if delta is None or len(self._chain_bytes) >= MAX_CHAIN or (is_durable and not self._is_anchored):
            return True
        return sum(self._chain_bytes) + delta.num_bytes > sum(entry.num_bytes for entry in entries.values())

    def copy_of_newest(self) -> Callable[[Path], None]:
        """Writes the model's file as it is now, whenever it is called, from any thread. Until it is forgotten, host
        memory may hold the model once more."""
        assert self._newest is not None
        manifest, weights = self._newest
        return lambda path: _write_model(path, manifest.tensors, weights)


def _write_model(path: Path, entries: Mapping[str, TensorEntry], weights: Snapshot) -> None:
    with path.open("wb") as file:
        file.write(model_layout(entries).header)
        for name in entries:
            file.write(bytes_of(weights.tensors[name]).data)


def _in_order(act: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """What `act` makes of each item, in their order; no more than a few at a time are waiting."""
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="encode") as threads:
        for item in items:
            begun.append(threads.submit(act, item))
            if len(begun) > 2 * num_threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
