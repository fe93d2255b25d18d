"""Publishing weight versions: files first, then Redis, then a hint to every replica.

Versions only grow. The next number is durable in the run's folder before anything carries it, and a start takes one
above the largest that the folder, Redis or a replica knows. Each learner writes into a folder of its own epoch, so
that a fenced one that wakes up cannot touch what its successor serves. The manifest's SHA-256 stands in Redis, so the
bytes may come from anyone.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import redis
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.http_service import bearer
from common.weights import (
    MANIFEST_FILE,
    MODEL_FILE,
    Manifest,
    TensorEntry,
    delete_versions_but,
    encode_manifest,
    file_entry,
    fsync_path,
    move_into_place,
    stored_versions,
    version_folder,
)
from services.learner.store import LearnerStore

NOTIFY_TIMEOUT_S = 5.0
COUNTER_FILE = "VERSION"
_log = logging.getLogger(__name__)


class Versions:
    """The run's weight versions; `root` is this learner's folder in `parent`, `current` the version that was published
    last (0: none yet)."""

    def __init__(self, parent: Path, store: LearnerStore, url: str, token: str, num_kept: int) -> None:
        self.root = parent / f"epoch-{store.epoch:06d}"
        self.store = store
        self.url = url
        self.num_kept = num_kept
        self.steps = store.version_steps()
        """Which step made a version."""
        self.current = 0
        self.highest = self._highest_known(parent)
        """No replica can have sampled with a version above it."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._note_number()
        for earlier in parent.glob("epoch-*"):
            if earlier.name < self.root.name:
                shutil.rmtree(earlier, ignore_errors=True)
        self._notifiers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="notify")
        self._http = httpx.Client(timeout=NOTIFY_TIMEOUT_S, headers=bearer(token), trust_env=False)

    def publish(self, tensors: Mapping[str, Tensor], step: int) -> Manifest:
        """Makes `tensors` the next version, which `step` made; returns when replicas can find it. Raises `Fenced` also
        where a successor has deleted this learner's folder."""
        try:
            version = self._take_number()
            manifest = self._write(version, step, tensors)
        except (OSError, SafetensorError):
            self.store.check_fence()
            raise
        digest = hashlib.sha256(encode_manifest(manifest)).hexdigest()
        weights = {"version": version, "step": step, "sha256": digest, "url": self.url}
        fields = [str(part) for pair in weights.items() for part in pair]
        keys = self.store.keys
        self.steps[version] = step  # before a group of this version can come back
        self.store.execute([("HSET", keys.versions, version, step), ("HSET", keys.weights, *fields)])
        self.current = version
        delete_versions_but(self.root, self.num_kept)
        self._notifiers.submit(self._notify_replicas, version)
        return manifest

    def close(self) -> None:
        self._notifiers.shutdown()
        self._http.close()

    def _write(self, version: int, step: int, tensors: Mapping[str, Tensor]) -> Manifest:
        aside = self.root / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside / MODEL_FILE)
        manifest = Manifest(
            version=version,
            step=step,
            lineage=f"epoch-{self.store.epoch}",
            files={MODEL_FILE: file_entry(aside / MODEL_FILE)},
            tensors={
                name: TensorEntry(str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()
            },
        )
        (aside / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        move_into_place(aside, version_folder(self.root, version))
        return manifest

    def _notify_replicas(self, version: int) -> None:
        """A hint only: a replica that misses it looks by itself."""
        try:
            replicas = self.store.replicas()
        except redis.RedisError as error:
            _log.warning("version %d: replicas cannot be listed, they will look by themselves: %s", version, error)
            return
        for replica in replicas:
            try:
                self._http.post(f"{replica.url}/weights", json={"version": version}).raise_for_status()
            except httpx.HTTPError as error:
                _log.warning("version %d: replica %s did not take the hint: %s", version, replica.replica, error)

    def _highest_known(self, parent: Path) -> int:
        on_disk = [int(counter.read_text() or 0) for counter in parent.glob(f"epoch-*/{COUNTER_FILE}")]
        stored = [version for folder in parent.glob("epoch-*") for version in stored_versions(folder)]
        serving = [heartbeat.weight_version for heartbeat in self.store.replicas()]
        return max([0, *on_disk, *stored, *self.steps, *serving])

    def _take_number(self) -> int:
        self.highest += 1
        self._note_number()
        return self.highest

    def _note_number(self) -> None:
        aside = self.root / f"{COUNTER_FILE}.aside"
        aside.write_text(str(self.highest))
        fsync_path(aside)
        aside.replace(self.root / COUNTER_FILE)
        fsync_path(self.root)
