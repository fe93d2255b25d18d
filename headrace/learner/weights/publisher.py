"""Publishing weight versions: files first, then Redis, then a hint to every replica.

Version numbers only grow. The next number is durable in the run's folder before anything uses it, and a learner that
starts continues above the largest number that the folder, Redis or a replica knows. Each learner writes into a folder
of its own epoch, so that a fenced learner cannot touch what its successor serves. Redis has the manifest's SHA-256, so
the bytes may come from anywhere: the hint tells each replica which peers to fetch from, so that the replicas form a
tree, and only its root fetches from the learner.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import redis

from headrace.common.hardware.device import machine_id
from headrace.common.http.addresses import bearer_header
from headrace.common.process.atomic_files import fsync_path
from headrace.common.weights.files import (
    Manifest,
    encode_manifest,
    sha256_hex,
    stored_versions,
    version_file,
    version_folder,
)
from headrace.common.weights.memory_folder import MemoryFolder, memory_backed_folder
from headrace.learner.model.host_snapshots import Snapshot, SnapshotPool, Weight
from headrace.learner.store.store import LearnerStore
from headrace.learner.weights.version_writer import VersionWriter

NOTIFY_TIMEOUT_S = 5.0
COUNTER_FILE = "VERSION"
MEMORY_FOLDER_PREFIX = "headrace-versions-"
SPARE_BYTES = 1 << 24
"""Bytes that must stay free in the memory-backed folder beyond a model's tensors."""
TREE_FANOUT = 2
"""Number of replicas that fetch from each replica."""
_log = logging.getLogger(__name__)


class WeightVersions:
    """The run's weight versions; `root` is this learner's folder in `parent`, `current` the version published last
    (0: none yet)."""

    def __init__(self, parent: Path, store: LearnerStore, url: str, token: str) -> None:
        self.root = epoch_folder(parent, store.epoch)
        self.store = store
        self.url = url
        self.steps = store.version_steps()
        """The step that made each version."""
        self.current = 0
        self.is_publishing = False
        """A version is being published; `current` is still the one before it."""
        self.highest = self._highest_known(parent)
        """The highest number in use: no replica can have sampled with a version above it."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._write_counter()
        for earlier in parent.glob("epoch-*"):
            if earlier.name < self.root.name:
                shutil.rmtree(earlier, ignore_errors=True)
        self._writer = VersionWriter(f"epoch-{store.epoch}")
        self._snapshots = SnapshotPool()
        self._notifiers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="notify")
        self._memory = MemoryFolder(MEMORY_FOLDER_PREFIX, memory_backed_folder())
        self.memory = self._memory.root
        """Model files, in one folder per version, for replicas that share this memory."""
        self._http = httpx.Client(timeout=NOTIFY_TIMEOUT_S, headers=bearer_header(token), trust_env=False)

    def snapshot(self, tensors: Mapping[str, Weight]) -> Snapshot:
        """A copy in host memory, for `publish`: the tensors may change as soon as this returns."""
        return self._snapshots.take(tensors)

    def reserve(self) -> int:
        """Returns the next version's number and makes it the highest; `publish` makes it durable before it is used."""
        self.highest += 1
        return self.highest

    def publish(self, weights: Snapshot, step: int, version: int) -> Manifest:
        """Publishes `weights`, made by `step`, under the reserved number; returns when replicas can find the version.

        Raises `Fenced`, also where a successor has deleted this learner's folder, or `OSError`, after which it may be
        called again.
        """
        sharing = [replica.shares_memory for replica in self.store.replicas()]
        is_shared = any(sharing) and self._has_room(weights)
        try:
            self._write_counter()
            memory = self._new_folder_in_memory(version) if is_shared else None
            folder, is_memory_only = version_folder(self.root, version), is_shared and all(sharing)
            manifest = self._writer.write(folder, version, step, weights, memory, is_memory_only=is_memory_only)
        except OSError:
            self.store.check_fence()
            raise
        digest = sha256_hex(encode_manifest(manifest))
        announced = {"version": version, "step": step, "sha256": digest, "url": self.url}
        announced |= {"machine": machine_id(), "folder": self.root.resolve(), "memory": self.memory}
        fields = [str(part) for pair in announced.items() for part in pair]
        keys = self.store.keys
        self.steps[version] = step  # before a group of this version can come back
        self.store.execute([("HSET", keys.versions, version, step), ("HSET", keys.weights, *fields)])
        before, self.current = self.current, version
        _log.info("published, made by step %d", step, extra={"version": version})
        self._delete_unneeded(before)
        self._notifiers.submit(self._notify_replicas, version)
        return manifest

    def newest_model_writer(self) -> Callable[[Path], None]:
        """Returns a function that writes the model file of the version that is the newest now."""
        return self._writer.newest_model_writer()

    def close(self) -> None:
        self._notifiers.shutdown()
        self._http.close()
        self._memory.close()

    def file_of(self, version: int, name: str) -> Path | None:
        """The version's file `name`, on disk or in memory; None if there is none."""
        return version_file(self.root, version, name) or version_file(self.memory, version, name)

    def _has_room(self, weights: Snapshot) -> bool:
        num_bytes = sum(tensor.nbytes for tensor in weights.tensors.values())
        return shutil.disk_usage(self.memory).free > num_bytes + SPARE_BYTES

    def _new_folder_in_memory(self, version: int) -> Path:
        """A new folder for the version; deletes what a failed version has left."""
        for path in self.memory.glob("v*"):
            if path != version_folder(self.memory, self.current):
                shutil.rmtree(path, ignore_errors=True)
        folder = version_folder(self.memory, version)
        folder.mkdir()
        return folder

    def _delete_unneeded(self, before: int) -> None:
        """Deletes versions older than the last anchor but one: replicas that serve those start from an anchor. In
        memory the version `before` is kept as well: a replica may be reading it."""
        for version in stored_versions(self.root):
            if version < self._writer.anchors[-2:][0]:
                shutil.rmtree(version_folder(self.root, version), ignore_errors=True)
        for path in self.memory.glob("v*"):
            if path not in (version_folder(self.memory, version) for version in (before, self.current)):
                shutil.rmtree(path, ignore_errors=True)

    def _notify_replicas(self, version: int) -> None:
        """Sends a hint to every replica; one that misses it finds the version by polling."""
        try:
            replicas = self.store.replicas()
        except redis.RedisError as error:
            _log.warning("version %d: replicas cannot be listed, they will find it by polling: %s", version, error)
            return
        urls = [replica.url for replica in sorted(replicas, key=lambda one: (one.state != "running", one.replica))]
        for index, url in enumerate(urls):
            self._notifiers.submit(
                self._notify, url, version, [urls[ancestor] for ancestor in ancestors_in_tree(index)]
            )

    def _notify(self, url: str, version: int, sources: Sequence[str]) -> None:
        try:
            self._http.post(f"{url}/weights", json={"version": version, "sources": sources}).raise_for_status()
        except httpx.HTTPError as error:
            _log.warning("version %d: the replica at %s did not accept the hint: %s", version, url, error)

    def _highest_known(self, parent: Path) -> int:
        on_disk = [int(counter.read_text() or 0) for counter in parent.glob(f"epoch-*/{COUNTER_FILE}")]
        stored = [version for folder in parent.glob("epoch-*") for version in stored_versions(folder)]
        serving = [heartbeat.weight_version for heartbeat in self.store.replicas()]
        return max([0, *on_disk, *stored, *self.steps, *serving])

    def _write_counter(self) -> None:
        aside = self.root / f"{COUNTER_FILE}.aside"
        aside.write_text(str(self.highest))
        fsync_path(aside)
        aside.replace(self.root / COUNTER_FILE)
        fsync_path(self.root)


def epoch_folder(parent: Path, epoch: int) -> Path:
    """The folder in `parent` of the weights that the learner of `epoch` publishes. Names are in the order of epochs."""
    return parent / f"epoch-{epoch:06d}"


def ancestors_in_tree(index: int) -> list[int]:
    """The ancestors of the node `index`, the nearest first, up to the root 0, which fetches from the learner."""
    ancestors = []
    while index > 0:
        index = (index - 1) // TREE_FANOUT
        ancestors.append(index)
    return ancestors
