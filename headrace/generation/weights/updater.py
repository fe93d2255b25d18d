"""Keeps the engine on the newest weight version: fetches it, verifies it, swaps it in.

A version is fetched and built in host memory while generation continues; only the swap pauses it. The version is
reported only after the engine has confirmed it. If a swap fails, the replica reports the reason and leases no tickets
until a later attempt succeeds. No swap is sent to an engine that is down, and an engine that comes back must confirm
its version before it is used again.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import redis
import redis.asyncio

from headrace.common.config import ModelConfig
from headrace.common.metrics.swaps import SwapTotals
from headrace.common.models.hub import download
from headrace.common.redis.keys import Keys
from headrace.common.weights.files import WeightsError
from headrace.generation.engine.client import Engine, EngineError, SwapTimings
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.tickets.peers import live_replicas
from headrace.generation.weights.downloads import Fetcher
from headrace.generation.weights.local_weights import LocalWeights
from headrace.generation.weights.peer_api import WeightFileServer
from headrace.generation.weights.published_version import PublishedVersion, read_newest_version
from headrace.generation.weights.swap_slots import SwapSlots
from headrace.generation.weights.version_fetch import FetchedVersion, fetch_version

POLL_INTERVAL_S = 1.0
HINT_GRACE_S = 0.3
"""How long a replica that discovers a version by polling waits for the learner's hint about whom to fetch it from."""
MAX_PEERS = 3
"""Number of peers that a replica asks without a hint."""
_log = logging.getLogger(__name__)


class WeightUpdater:
    """`version` is the last one that the engine has confirmed, 0 before the first swap; its files are in
    `local.current_folder`."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        keys: Keys,
        local: LocalWeights,
        fetcher: Fetcher,
        swap_slots: SwapSlots,
        on_swap: Callable[[SwapTimings, FetchedVersion], Awaitable[None]],
    ) -> None:
        self.client = client
        self.keys = keys
        self.local = local
        self.fetcher = fetcher
        self.swap_slots = swap_slots
        self.file_server = WeightFileServer(local, fetcher)
        self.totals = SwapTotals()
        self.version = 0
        self.problem = ""
        self.confirmed_incarnation = 0
        """The engine's incarnation (`EngineSupervisor.incarnation`) that is known to serve `version`."""
        self.shares_memory = False
        """Whether the last version's model file could be linked from the learner's memory."""
        self.awaited_versions: list[int] = []
        """The versions for which callers of `wait_for_version` wait."""
        self._on_swap = on_swap
        self._hint = asyncio.Event()
        self._hinted_peers: tuple[int, list[str]] = (0, [])
        """The highest hinted version, and the peers that can be asked for it."""
        self._swapped = asyncio.Condition()

    def startup_weights(self) -> tuple[Path, int | None]:
        """The folder and version that an engine starts on: the verified version, or the base model before the first."""
        return self.local.current_folder, self.version or None

    def hint(self, version: int, sources: Sequence[str] = ()) -> None:
        """Reports a newer version, and the peers (`sources`) that have it or are fetching it."""
        if version > self._hinted_peers[0]:
            self._hinted_peers = version, list(sources)
        self._hint.set()

    async def wait_for_version(self, version: int, timeout_s: float) -> None:
        """Waits until `version` or a later one is served; raises `TimeoutError` after `timeout_s`."""
        self.awaited_versions.append(version)
        try:
            async with asyncio.timeout(timeout_s), self._swapped:
                await self._swapped.wait_for(lambda: self.version >= version and not self.problem)
        finally:
            self.awaited_versions.remove(version)

    async def run(self, supervisor: EngineSupervisor) -> None:
        """Runs until cancelled. Skips to the newest version; sets `problem` on a failure and tries again."""
        while True:
            await supervisor.serving.wait()
            incarnation = supervisor.incarnation
            try:
                await self._catch_up(supervisor.engine, incarnation)
            except (WeightsError, EngineError, redis.RedisError, OSError) as error:
                self.problem = str(error)
                _log.error("weights: %s", self.problem)
                if supervisor.engine.has_unverified_weights:
                    supervisor.request_restart(
                        incarnation, "the engine may hold other weights than it reports, after a swap that failed"
                    )
                if isinstance(error, EngineError):
                    await supervisor.is_responsive(incarnation)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_INTERVAL_S):
                    await self._hint.wait()
            self._hint.clear()

    async def close(self) -> None:
        await self.fetcher.aclose()
        self.local.close()

    async def _catch_up(self, engine: Engine, incarnation: int) -> None:
        """Returns when the engine, in this incarnation, serves the newest published version."""
        if incarnation != self.confirmed_incarnation and self.version and await engine.weight_version() != self.version:
            await engine.swap(self.local.current_folder, self.version)  # an external engine was restarted
        self.confirmed_incarnation = incarnation
        while (published := await self._read_published()) is not None and published.version > self.version:
            await self._install(published, engine)
        if engine.has_unverified_weights:  # an external engine: the replica's own would have been restarted
            if not self.version:
                raise WeightsError(
                    "the engine may hold other weights than it reports, and there is no version to give it"
                )
            await engine.swap(self.local.current_folder, self.version)
        await self._clear_problem()

    async def _read_published(self) -> PublishedVersion | None:
        return await read_newest_version(self.client, self.keys.weights)

    async def _install(self, published: PublishedVersion, engine: Engine) -> None:
        """Fetches the version and swaps it in. Also returns if the fetch fails because a newer version replaced it."""
        self.shares_memory = published.shares_memory_with(self.local.root)
        peers = await self._peers_to_ask(published.version)
        try:
            fetched = await fetch_version(self.local, self.fetcher, published, peers)
        except WeightsError as error:
            newest = await self._read_published()
            if newest is None or newest.version <= published.version:
                raise
            _log.warning("%s; continuing with version %d", error, newest.version)
            return
        try:
            async with self.swap_slots.acquire():
                timings = await engine.swap(self.local.folder_of(published.version), published.version)
        except BaseException:
            self.local.drop(published.version)
            raise
        self.local.activate(fetched.local)
        self.version = published.version
        await self._clear_problem()
        _log.info(
            "serving: %d bytes in %.3f s, applied in %.3f s, paused %.3f s",
            fetched.num_bytes, fetched.fetch_s, fetched.apply_s, timings.pause_s, extra={"version": self.version},
        )  # fmt: skip
        spent_s = {"pause": timings.pause_s, "load": timings.load_s, "confirm": timings.confirm_s}
        self.totals.add(fetched.num_bytes, spent_s | {"fetch": fetched.fetch_s, "apply": fetched.apply_s})
        await self._on_swap(timings, fetched)
        await engine.wait_for_progress(timings)

    async def _peers_to_ask(self, version: int) -> list[str]:
        """URLs of replicas to ask: those of the learner's hint, else some that serve the version."""
        if self._hinted_peers[0] < version:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HINT_GRACE_S):
                    await self._hint.wait()
        if self._hinted_peers[0] >= version:
            return self._hinted_peers[1]
        serving = [one.url for one in await live_replicas(self.client, self.keys) if one.weight_version == version]
        return random.sample(serving, min(len(serving), MAX_PEERS))

    async def _clear_problem(self) -> None:
        async with self._swapped:
            self.problem = ""
            self._swapped.notify_all()


def local_model_folder(model: ModelConfig) -> Path:
    """The model's folder, or that of the hub's files on this machine, downloaded if necessary. Raises `ValueError` if a
    hub model has no safetensors files."""
    if (folder := Path(model.location)).is_dir():
        return folder
    folder = download(model)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model.path {model.path!r}: expected weights as *.safetensors on the hub, found none")
    return folder
