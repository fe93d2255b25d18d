"""Keeps the engine on the newest weight version: fetch, verify, swap, in that order, while generation goes on.

The bytes are verified against the manifest, and the manifest against the SHA-256 in Redis, before the engine is
paused. A version is reported only after the engine has confirmed it. A replica whose swap fails says why and
takes no work until a later version succeeds.
"""

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import redis
import redis.asyncio

from common.keys import Keys
from common.weights import MANIFEST_FILE, MODEL_FILE, WeightsError, decode_manifest, verify, version_folder
from services.generation.engine import Engine, EngineError, SwapTimings

LOOK_INTERVAL_S = 1.0
FETCH_TIMEOUT_S = 120.0
_log = logging.getLogger(__name__)


class Published(NamedTuple):
    """What Redis says of the newest version."""

    version: int
    sha256: str
    url: str


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
        self._on_swap = on_swap
        self._root = Path(tempfile.mkdtemp(prefix="headrace-weights-", dir=_memory_backed()))
        self._hint = asyncio.Event()
        self._swapped = asyncio.Condition()
        self._http = httpx.AsyncClient(timeout=FETCH_TIMEOUT_S, trust_env=False)

    @property
    def folder(self) -> Path:
        """What a restarted engine starts on: the verified version, or the base model before there is one."""
        return version_folder(self._root, self.version) if self.version else self.model_folder

    def look_now(self) -> None:
        self._hint.set()

    async def at_least(self, version: int) -> None:
        async with self._swapped:
            await self._swapped.wait_for(lambda: self.version >= version and not self.problem)

    async def follow(self, engine: Engine) -> None:
        """Until cancelled. Skips to the newest; a failure is kept in `problem` and tried again."""
        while True:
            try:
                published = await self._published()
                if published is not None and published.version > self.version:
                    await self._take(published, engine)
                    continue
                await self._are_well()
            except (WeightsError, EngineError, httpx.HTTPError, redis.RedisError, OSError) as error:
                self.problem = f"weights: {error}"
                _log.error("%s", self.problem)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await self._hint.wait()
            self._hint.clear()

    async def close(self) -> None:
        await self._http.aclose()
        shutil.rmtree(self._root, ignore_errors=True)

    async def _published(self) -> Published | None:
        version, sha256, url = await self.client.hmget(self.keys.weights, ["version", "sha256", "url"])
        return None if version is None else Published(int(version), sha256.decode(), url.decode())

    async def _take(self, published: Published, engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        folder = version_folder(self._root, published.version)
        num_bytes = await self._fetch(published, folder)
        fetch_s = loop.time() - started_s
        timings = await engine.swap(folder, published.version)
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

    async def _fetch(self, published: Published, folder: Path) -> int:
        """The bytes of a version, verified, with what else the engine needs to start on the folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        place = f"{published.url}/weights/{published.version}"
        response = await self._http.get(f"{place}/{MANIFEST_FILE}")
        manifest = decode_manifest(response.raise_for_status().content, published.sha256)
        for name in manifest.files:
            async with self._http.stream("GET", f"{place}/{name}") as stream:
                stream.raise_for_status()
                with (folder / name).open("wb") as file:
                    async for chunk in stream.aiter_bytes(1 << 20):
                        file.write(chunk)
        await asyncio.to_thread(verify, folder, manifest)
        for path in self.model_folder.iterdir():
            if (
                path.is_file()
                and path.suffix not in (".safetensors", ".bin")
                and path.name != f"{MODEL_FILE}.index.json"
            ):
                (folder / path.name).symlink_to(path.resolve())
        return manifest.num_bytes


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
