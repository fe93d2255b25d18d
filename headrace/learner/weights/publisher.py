"""Publishing weight versions: files first, then Redis, then a hint to every replica.

Versions only grow. The next number is durable in the run's folder before anything carries it, and a start takes one
above the largest that the folder, Redis or a replica knows. Each learner writes into a folder of its own epoch, so
that a fenced one that wakes up cannot touch what its successor serves. The manifest's SHA-256 stands in Redis, so the
bytes may come from anyone: replicas are told whom to ask so that they form a tree, of which the learner feeds the root.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import redis

from headrace.common.hardware.device import machine_id
from headrace.common.http.addresses import bearer
from headrace.common.process.atomic_files import fsync_path
from headrace.common.weights.files import (
    Manifest,
    encode_manifest,
    file_of,
    sha256_of,
    stored_versions,
    version_folder,
)
from headrace.common.weights.memory_folder import MemoryFolder, memory_backed
from headrace.learner.model.host_snapshots import Snapshot, Snapshots, Weight
from headrace.learner.store.store import LearnerStore
from headrace.learner.weights.version_writer import VersionWriter

NOTIFY_TIMEOUT_S = 5.0
COUNTER_FILE = "VERSION"
PREFIX = "headrace-versions-"
SPARE_BYTES = 1 << 24
"""Of the memory-backed folder, beyond a model's tensors."""
BRANCHES = 2
"""Replicas that fetch from each replica."""
_log = logging.getLogger(__name__)


class Versions:
    """The run's weight versions; `root` is this learner's folder in `parent`, `current` the version that was published
    last (0: none yet)."""

    def __init__(self, parent: Path, store: LearnerStore, url: str, token: str) -> None:
        self.root = parent / f"epoch-{store.epoch:06d}"
        self.store = store
        self.url = url
        self.steps = store.version_steps()
        """Which step made a version."""
        self.current = 0
        self.is_publishing = False
        """A version is on its way: `current` is the one before."""
        self.highest = self._highest_known(parent)
        """No replica can have sampled with a version above it."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._note_number()
        for earlier in parent.glob("epoch-*"):
            if earlier.name < self.root.name:
                shutil.rmtree(earlier, ignore_errors=True)
        self._writer = VersionWriter(f"epoch-{store.epoch}")
        self._snapshots = Snapshots()
        self._notifiers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="notify")
        self._memory = MemoryFolder(PREFIX, memory_backed())
        self.memory = self._memory.root
        """Models' files, in versions' folders, for replicas that share it."""
        self._http = httpx.Client(timeout=NOTIFY_TIMEOUT_S, headers=bearer(token), trust_env=False)

    def copy(self, tensors: Mapping[str, Weight]) -> Snapshot:
        """What `publish` takes: the tensors may change as soon as this returns."""
        return self._snapshots.take(tensors)

    def reserve(self) -> int:
        """The number of the next version, which is the highest from now on; `publish` notes it before a file has it."""
        self.highest += 1
        return self.highest

    def publish(self, weights: Snapshot, step: int, version: int) -> Manifest:
        """Makes `weights` the version of the reserved number, which `step` made; returns when replicas can find it.
        Raises `Fenced` also where a successor has deleted this learner's folder; after another `OSError` it may be
        called again."""
        sharing = [replica.shares_memory for replica in self.store.replicas()]
        is_shared = any(sharing) and self._has_room(weights)
        try:
            self._note_number()
            memory = self._new_folder_in_memory(version) if is_shared else None
            place, alone = version_folder(self.root, version), is_shared and all(sharing)
            manifest = self._writer.write(place, version, step, weights, memory, alone=alone)
        except OSError:
            self.store.check_fence()
            raise
        digest = sha256_of(encode_manifest(manifest))
        told = {"version": version, "step": step, "sha256": digest, "url": self.url}
        told |= {"machine": machine_id(), "folder": self.root.resolve(), "memory": self.memory}
        fields = [str(part) for pair in told.items() for part in pair]
        keys = self.store.keys
        self.steps[version] = step  # before a group of this version can come back
        self.store.execute([("HSET", keys.versions, version, step), ("HSET", keys.weights, *fields)])
        before, self.current = self.current, version
        _log.info("published, made by step %d", step, extra={"version": version})
        self._delete_unneeded(before)
        self._notifiers.submit(self._notify_replicas, version)
        return manifest

    def copy_of_newest(self) -> Callable[[Path], None]:
        """Writes the model's file of the version that is the newest now."""
        return self._writer.copy_of_newest()

    def close(self) -> None:
        self._notifiers.shutdown()
        self._http.close()
        self._memory.close()

    def file_of(self, version: int, name: str) -> Path | None:
        """The version's file of that name, on the disk or in memory; None if there is none."""
        return file_of(self.root, version, name) or file_of(self.memory, version, name)

    def _has_room(self, weights: Snapshot) -> bool:
        num_bytes = sum(tensor.nbytes for tensor in weights.tensors.values())
        return shutil.disk_usage(self.memory).free > num_bytes + SPARE_BYTES

    def _new_folder_in_memory(self, version: int) -> Path:
        """What a version that failed has left there goes."""
        for path in self.memory.glob("v*"):
            if path != version_folder(self.memory, self.current):
                shutil.rmtree(path, ignore_errors=True)
        folder = version_folder(self.memory, version)
        folder.mkdir()
        return folder

    def _delete_unneeded(self, before: int) -> None:
        """Whoever serves an older version than the last anchor but one starts from an anchor. In memory the version
        `before` is left as well: a replica may just be taking it."""
        for version in stored_versions(self.root):
            if version < self._writer.anchors[-2:][0]:
                shutil.rmtree(version_folder(self.root, version), ignore_errors=True)
        for path in self.memory.glob("v*"):
            if path not in (version_folder(self.memory, version) for version in (before, self.current)):
                shutil.rmtree(path, ignore_errors=True)

    def _notify_replicas(self, version: int) -> None:
        """A hint only: a replica that misses it looks by itself."""
        try:
            replicas = self.store.replicas()
        except redis.RedisError as error:
            _log.warning("version %d: replicas cannot be listed, they will look by themselves: %s", version, error)
            return
        urls = [replica.url for replica in sorted(replicas, key=lambda one: (one.state != "running", one.replica))]
        for index, url in enumerate(urls):
            self._notifiers.submit(self._notify, url, version, [urls[above] for above in places_above(index)])

    def _notify(self, url: str, version: int, sources: Sequence[str]) -> None:
        try:
            self._http.post(f"{url}/weights", json={"version": version, "sources": sources}).raise_for_status()
        except httpx.HTTPError as error:
            _log.warning("version %d: the replica at %s did not take the hint: %s", version, url, error)

    def _highest_known(self, parent: Path) -> int:
        on_disk = [int(counter.read_text() or 0) for counter in parent.glob(f"epoch-*/{COUNTER_FILE}")]
        stored = [version for folder in parent.glob("epoch-*") for version in stored_versions(folder)]
        serving = [heartbeat.weight_version for heartbeat in self.store.replicas()]
        return max([0, *on_disk, *stored, *self.steps, *serving])

    def _note_number(self) -> None:
        aside = self.root / f"{COUNTER_FILE}.aside"
        aside.write_text(str(self.highest))
        fsync_path(aside)
        aside.replace(self.root / COUNTER_FILE)
        fsync_path(self.root)


def places_above(place: int) -> list[int]:
    """The way from a place in the tree to its root, the nearest first; the root fetches from the learner."""
    above = []
    while place > 0:
        place = (place - 1) // BRANCHES
        above.append(place)
    return above
