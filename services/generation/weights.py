"""Keeps the engine on the newest weight version: fetch, verify, swap, in that order, while generation goes on.

A version is reported only after the engine has confirmed it. A replica whose swap fails says why and takes no work
until a later attempt succeeds; nothing is swapped into an engine that is down, and an engine that has been away must
confirm its version before it is used again.
"""

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import redis
import redis.asyncio

from common.keys import Keys
from common.weights import WeightsError, version_folder
from services.generation.engine import Engine, EngineError, SwapTimings
from services.generation.engine_keeper import EngineKeeper
from services.generation.publication import READ_TIMEOUT_S, Published, fetch, newest_version

LOOK_INTERVAL_S = 1.0
_log = logging.getLogger(__name__)


class WeightFollower:
    """`version` is what the engine has confirmed, 0 before the first swap; its files are in `folder`."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        keys: Keys,
        model_folder: Path,
        on_swap: Callable[[int, SwapTimings, float, int], Awaitable[None]],
    ) -> None:
        self.client = client
        self.keys = keys
        self.model_folder = model_folder
        self.version = 0
        self.problem = ""
        self.confirmed_life = 0
        """The life of the engine (`EngineKeeper.life`) that is known to serve `version`."""
        self.awaited: list[int] = []
        """The versions that callers of `at_least` wait for."""
        self._on_swap = on_swap
        self._root = Path(tempfile.mkdtemp(prefix="headrace-weights-", dir=_memory_backed()))
        self._hint = asyncio.Event()
        self._swapped = asyncio.Condition()
        self._http = httpx.AsyncClient(timeout=READ_TIMEOUT_S, trust_env=False)

    @property
    def folder(self) -> Path:
        return version_folder(self._root, self.version) if self.version else self.model_folder

    def engine_start(self) -> tuple[Path, int | None]:
        """What an engine starts on: the verified version, or the base model before there is one."""
        return self.folder, self.version or None

    def look_now(self) -> None:
        self._hint.set()

    async def at_least(self, version: int, timeout_s: float) -> None:
        """Raises `TimeoutError` if the version is not served in time."""
        self.awaited.append(version)
        try:
            async with asyncio.timeout(timeout_s), self._swapped:
                await self._swapped.wait_for(lambda: self.version >= version and not self.problem)
        finally:
            self.awaited.remove(version)

    async def follow(self, keeper: EngineKeeper) -> None:
        """Until cancelled. Skips to the newest; a failure is kept in `problem` and tried again."""
        while True:
            await keeper.serving.wait()
            life = keeper.life
            try:
                await self._catch_up(keeper.engine, life)
            except (WeightsError, EngineError, redis.RedisError, OSError) as error:
                self.problem = str(error)
                _log.error("weights: %s", self.problem)
                if isinstance(error, EngineError):
                    await keeper.answers(life)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await self._hint.wait()
            self._hint.clear()

    async def close(self) -> None:
        await self._http.aclose()
        shutil.rmtree(self._root, ignore_errors=True)

    async def _catch_up(self, engine: Engine, life: int) -> None:
        """Returns when the engine, in this life of it, serves the newest version that there is."""
        if life != self.confirmed_life and self.version and await engine.weight_version() != self.version:
            await engine.swap(self.folder, self.version)  # somebody else has started it again
        self.confirmed_life = life
        while (published := await self._published()) is not None and published.version > self.version:
            await self._take(published, engine)
        await self._are_well()

    async def _published(self) -> Published | None:
        return await newest_version(self.client, self.keys.weights)

    async def _take(self, published: Published, engine: Engine) -> None:
        """Returns, too, if the version cannot be had because a newer one has taken its place."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        folder = version_folder(self._root, published.version)
        try:
            num_bytes = await fetch(self._http, published, folder, self.model_folder)
        except WeightsError as error:
            newest = await self._published()
            if newest is None or newest.version <= published.version:
                raise
            _log.warning("%s; going on to version %d", error, newest.version)
            return
        fetch_s = loop.time() - started_s
        try:
            timings = await engine.swap(folder, published.version)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        outdated = self.folder if self.version else None
        self.version = published.version
        await self._are_well()
        if outdated is not None:
            shutil.rmtree(outdated, ignore_errors=True)
        _log.info(
            "serving version %d: %d bytes in %.3f s, paused %.3f s", self.version, num_bytes, fetch_s, timings.pause_s
        )
        await self._on_swap(published.version, timings, fetch_s, num_bytes)

    async def _are_well(self) -> None:
        async with self._swapped:
            self.problem = ""
            self._swapped.notify_all()


def _memory_backed() -> str | None:
    """A tmpfs where there is one; else the ordinary temporary folder."""
    shared_memory = Path("/dev/shm")
    return str(shared_memory) if shared_memory.is_dir() and _is_writable(shared_memory) else None


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def local_model_folder(path: str) -> Path:
    """The folder itself, or where the hub's files are on this machine (downloaded if they are not yet)."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    found: Any = snapshot_download(path)
    return Path(found)
