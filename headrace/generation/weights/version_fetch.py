"""Brings a published weight version into the replica's copy: what Redis says of it, who has it, and the way there.

Whatever is wrong with what Redis or anybody else says is a `WeightsError` that tells; nothing is left then of what had
been fetched.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import redis.asyncio

from headrace.common.hardware.device import machine_id
from headrace.common.weights.files import (
    DELTA_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    Manifest,
    WeightsError,
    version_folder,
)
from headrace.common.weights.memory_folder import LOCK_FILE
from headrace.generation.weights.downloads import Fetcher, file_source
from headrace.generation.weights.free_space import check_free_space
from headrace.generation.weights.local_weights import LocalVersion, LocalWeights, check_delta, check_model
from headrace.generation.weights.update_path import UpdatePath, find_update_paths

FETCH_DEADLINE_S = 600.0
MAX_QUOTED_CHARS = 500
_log = logging.getLogger(__name__)
_FIELDS = ("version", "sha256", "url", "machine", "folder", "memory")


class PublishedVersion(NamedTuple):
    """What Redis says of the newest version."""

    version: int
    sha256: str
    url: str
    machine: str = ""
    """The learner's (`machine_id`), where `folder` has the files."""
    folder: str = ""
    memory: str = ""
    """The learner's memory-backed folder, which may have models' files."""

    @property
    def is_on_this_machine(self) -> bool:
        """The learner is on this machine."""
        return bool(self.machine) and self.machine == machine_id()

    def shares_memory_with(self, folder: Path) -> bool:
        """A file in the learner's memory can be had under a name in `folder` as well, without a copy: it is tried."""
        probe = folder / "probe"
        with contextlib.suppress(OSError):
            if self.is_on_this_machine and self.memory:
                os.link(Path(self.memory) / LOCK_FILE, probe)
                probe.unlink()
                return True
        return False

    def sources(self, peers: Sequence[str]) -> list[str]:
        """Where to ask for its files, in this order: the learner's folder if it is here, those who were named, the
        learner."""
        here = [file_source(Path(self.folder))] if self.is_on_this_machine and Path(self.folder).is_dir() else []
        return list(dict.fromkeys([*here, *peers, self.url]))


class FetchedVersion(NamedTuple):
    """A version that is here: how many bytes came for it, and where the time went."""

    num_bytes: int
    fetch_s: float
    apply_s: float
    local: LocalVersion


async def read_newest_version(client: redis.asyncio.Redis, key: str) -> PublishedVersion | None:
    """None before the first version, and after a Redis that lost it."""
    values = await client.hmget(key, _FIELDS)
    if not any(values):
        return None
    fields = {name: (value or b"").decode(errors="replace") for name, value in zip(_FIELDS, values, strict=True)}
    if not re.fullmatch("[1-9][0-9]{0,15}", fields["version"]) or not fields["sha256"] or not fields["url"]:
        told = str(fields)[:MAX_QUOTED_CHARS]
        raise WeightsError(f"Redis says of the newest version {told}: expected a number, a SHA-256 and a URL")
    return PublishedVersion(int(fields["version"]), *(fields[name] for name in _FIELDS[1:]))


async def fetch_version(
    local: LocalWeights, fetcher: Fetcher, published: PublishedVersion, peers: Sequence[str]
) -> FetchedVersion:
    """The version in its folder of `copy`, verified, with what else an engine needs to start on it."""
    attempt = _FetchAttempt(local, fetcher, published, peers)
    try:
        async with asyncio.timeout(FETCH_DEADLINE_S):
            return await attempt.run()
    except BaseException as error:
        attempt.clean_up()
        if isinstance(error, TimeoutError):
            raise WeightsError(f"version {published.version} did not arrive within {FETCH_DEADLINE_S:g} s") from error
        if isinstance(error, OSError):
            raise WeightsError(f"version {published.version}: {type(error).__name__}: {error}") from error
        raise


class _FetchAttempt:
    def __init__(
        self, local: LocalWeights, fetcher: Fetcher, published: PublishedVersion, peers: Sequence[str]
    ) -> None:
        self.local = local
        self.fetcher = fetcher
        self.published = published
        self.peers = peers
        self.sources = published.sources(peers)
        self.payloads: dict[int, bytes] = {}
        """The manifests that were read, by version."""
        self.begun: set[int] = set()
        self.num_bytes = 0

    async def run(self) -> FetchedVersion:
        newest = await self._manifest(self.published.version, self.published.sha256)
        if newest.has_model and await self._link(newest):
            return await self._take(UpdatePath(newest, []), newest)
        problems = []
        for held in [self.local.current, None] if self.local.current else [None]:
            for update_path in await find_update_paths(newest, held, bool(self.peers), self._manifest):
                try:
                    return await self._take(update_path, newest)
                except WeightsError as error:
                    problems.append(str(error))
                    _log.warning("%s", error)
        raise WeightsError("; ".join(problems))

    async def _take(self, update_path: UpdatePath, newest: Manifest) -> FetchedVersion:
        started_s = time.monotonic()
        await self._fetch(update_path)
        fetched_s = time.monotonic()
        await asyncio.to_thread(self._build, update_path)
        self.local.link_config_and_tokenizer(newest.version)
        held = LocalVersion(newest, self.published.sha256)
        return FetchedVersion(self.num_bytes, fetched_s - started_s, time.monotonic() - fetched_s, held)

    async def _link(self, newest: Manifest) -> bool:
        """The learner's own file becomes ours as well, once its bytes are verified: nobody ever changes it."""
        if not self.published.shares_memory_with(self.local.root):
            return False
        self._begin(newest.version)
        path = self.local.folder_of(newest.version) / MODEL_FILE
        try:
            os.link(version_folder(Path(self.published.memory), newest.version) / MODEL_FILE, path)
            await asyncio.to_thread(check_model, path, newest)
        except FileNotFoundError:  # it goes by the disk
            return False
        except (OSError, WeightsError) as error:
            _log.warning("version %d in the learner's memory: %s", newest.version, error)
            path.unlink(missing_ok=True)
            return False
        return True

    def clean_up(self) -> None:
        for version in self.begun:
            self.local.drop(version)

    async def _manifest(self, version: int, sha256: str) -> Manifest:
        manifest, self.payloads[version] = await self.fetcher.fetch_manifest(self.sources, version, sha256)
        return manifest

    async def _fetch(self, update_path: UpdatePath) -> None:
        self._begin(self.published.version)
        if update_path.model is not None:
            check = partial(check_model, manifest=update_path.model)
            # of a version that is no anchor only other replicas have all of it
            sources = self.sources if update_path.model.has_model else self.peers
            await self._file(
                update_path.model,
                MODEL_FILE,
                self._start(update_path),
                update_path.model.num_model_bytes,
                sources,
                check,
            )
        for manifest in update_path.deltas:
            assert manifest.delta is not None
            self._begin(manifest.version)
            path = self.local.folder_of(manifest.version) / DELTA_FILE
            check = partial(check_delta, delta=manifest.delta)
            await self._file(manifest, DELTA_FILE, path, manifest.delta.num_bytes, self.sources, check)

    def _begin(self, version: int) -> None:
        """Its folder, with its manifest, which others may ask for from now on; the served one stays as it is."""
        folder = self.local.folder_of(version)
        if not folder.exists():
            folder.mkdir()
            self.begun.add(version)
            (folder / MANIFEST_FILE).write_bytes(self.payloads[version])

    def _start(self, update_path: UpdatePath) -> Path:
        """The model's file that the deltas are applied to, or, if there are none, the one that results."""
        if update_path.model is None:
            return self.local.current_folder / MODEL_FILE
        return self.local.folder_of(self.published.version) / (
            f"{MODEL_FILE}.start" if update_path.deltas else MODEL_FILE
        )

    async def _file(
        self,
        manifest: Manifest,
        name: str,
        path: Path,
        num_bytes: int,
        sources: Sequence[str],
        check: Callable[[Path], None],
    ) -> None:
        if not path.exists():  # else an earlier attempt has brought it, or another update_path of this one
            check_free_space(path.parent, num_bytes)
            self.num_bytes += await self.fetcher.fetch_file(sources, manifest.version, name, path, num_bytes, check)

    def _build(self, update_path: UpdatePath) -> None:
        if update_path.deltas:
            self.local.build_from_deltas(self._start(update_path), update_path.deltas)
