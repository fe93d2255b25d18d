"""Fetches a published weight version into the replica's local weights by the cheapest update path that works.

Any error of Redis' fields or of a source is a `WeightsError` with the reason; after one, no fetched file is left.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from headrace.common.weights.files import (
    DELTA_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    Manifest,
    WeightsError,
    version_folder,
)
from headrace.generation.weights.downloads import Fetcher
from headrace.generation.weights.free_space import check_free_space
from headrace.generation.weights.local_weights import LocalVersion, LocalWeights, check_delta, check_model
from headrace.generation.weights.published_version import PublishedVersion
from headrace.generation.weights.update_path import UpdatePath, find_update_paths

FETCH_DEADLINE_S = 600.0
_log = logging.getLogger(__name__)


class FetchedVersion(NamedTuple):
    """A version that was fetched and verified, the bytes that were transferred for it, and the durations."""

    num_bytes: int
    fetch_s: float
    apply_s: float
    local: LocalVersion


async def fetch_version(
    local: LocalWeights, fetcher: Fetcher, published: PublishedVersion, peers: Sequence[str]
) -> FetchedVersion:
    """Fetches and verifies the version, into its folder of `local`, with the other files that an engine needs."""
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
        self.manifests: dict[int, bytes] = {}
        """The manifests that were read, encoded, by version."""
        self.created: set[int] = set()
        """Versions whose folders this attempt created."""
        self.num_bytes = 0

    async def run(self) -> FetchedVersion:
        newest = await self._manifest(self.published.version, self.published.sha256)
        if newest.has_model and await self._link(newest):
            return await self._update_by(UpdatePath(newest, []), newest)
        problems = []
        for current in [self.local.current, None] if self.local.current else [None]:
            for update_path in await find_update_paths(newest, current, bool(self.peers), self._manifest):
                try:
                    return await self._update_by(update_path, newest)
                except WeightsError as error:
                    problems.append(str(error))
                    _log.warning("%s", error)
        raise WeightsError("; ".join(problems))

    def clean_up(self) -> None:
        for version in self.created:
            self.local.drop(version)

    async def _update_by(self, update_path: UpdatePath, newest: Manifest) -> FetchedVersion:
        started_s = time.monotonic()
        await self._fetch(update_path)
        fetched_s = time.monotonic()
        if update_path.deltas:
            base = self._model_file(update_path)
            await asyncio.to_thread(self.local.build_from_deltas, base, update_path.deltas)
        self.local.link_config_and_tokenizer(newest.version)
        version = LocalVersion(newest, self.published.sha256)
        return FetchedVersion(self.num_bytes, fetched_s - started_s, time.monotonic() - fetched_s, version)

    async def _link(self, newest: Manifest) -> bool:
        """Hard-links the learner's model file, which never changes, and verifies its bytes; False if that fails."""
        if not self.published.shares_memory_with(self.local.root):
            return False
        self._create_folder(newest.version)
        path = self.local.folder_of(newest.version) / MODEL_FILE
        try:
            os.link(version_folder(Path(self.published.memory), newest.version) / MODEL_FILE, path)
            await asyncio.to_thread(check_model, path, newest)
        except FileNotFoundError:  # the learner has published this version on disk
            return False
        except (OSError, WeightsError) as error:
            _log.warning("version %d in the learner's memory: %s", newest.version, error)
            path.unlink(missing_ok=True)
            return False
        return True

    async def _manifest(self, version: int, sha256: str) -> Manifest:
        manifest, self.manifests[version] = await self.fetcher.fetch_manifest(self.sources, version, sha256)
        return manifest

    async def _fetch(self, update_path: UpdatePath) -> None:
        self._create_folder(self.published.version)
        if (model := update_path.model) is not None:
            path, check = self._model_file(update_path), partial(check_model, manifest=model)
            # the whole model of a version that is not an anchor exists on other replicas only
            sources = self.sources if model.has_model else self.peers
            await self._fetch_file(model.version, MODEL_FILE, path, model.num_model_bytes, sources, check)
        for manifest in update_path.deltas:
            delta = manifest.delta
            assert delta is not None
            self._create_folder(manifest.version)
            path, check = self.local.folder_of(manifest.version) / DELTA_FILE, partial(check_delta, delta=delta)
            await self._fetch_file(manifest.version, DELTA_FILE, path, delta.num_bytes, self.sources, check)

    def _create_folder(self, version: int) -> None:
        """Creates the version's folder with its manifest, which others may then ask for; keeps an existing folder."""
        folder = self.local.folder_of(version)
        if not folder.exists():
            folder.mkdir()
            self.created.add(version)
            (folder / MANIFEST_FILE).write_bytes(self.manifests[version])

    def _model_file(self, update_path: UpdatePath) -> Path:
        """The model file to which the deltas are applied; without deltas, the resulting one."""
        if update_path.model is None:
            return self.local.current_folder / MODEL_FILE
        name = f"{MODEL_FILE}.start" if update_path.deltas else MODEL_FILE
        return self.local.folder_of(self.published.version) / name

    async def _fetch_file(
        self,
        version: int,
        name: str,
        path: Path,
        num_bytes: int,
        sources: Sequence[str],
        check: Callable[[Path], None],
    ) -> None:
        if not path.exists():  # else an earlier attempt, or another update path of this one, has fetched it
            check_free_space(path.parent, num_bytes)
            self.num_bytes += await self.fetcher.fetch_file(sources, version, name, path, num_bytes, check)
