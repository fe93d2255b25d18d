"""Fetches the files of a weight version from the learner's folder, other replicas or the learner.

The sources are asked one after the other: the learner's folder if it is on this machine, then the replicas that the
learner names, then the learner. If a source fails in the middle of a file, the next one continues it by a range
request. A file that does not match its digest is counted against its source and fetched again from the next one. Other
replicas can read a file while it is being downloaded (`Download`), so that a version passes through a tree of replicas
at the speed of the slowest link rather than hop by hop.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from headrace.common.http.addresses import bearer_header
from headrace.common.weights.files import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    WeightsError,
    decode_manifest,
    version_folder,
)

STALL_TIMEOUT_S = 10.0
"""After this time without a byte the next source is asked."""
CONNECT_TIMEOUT_S = 3.0
CHUNK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


class Download:
    """A file of known length that is being downloaded to `path`; readers follow it as it grows."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self.num_arrived = 0
        self.is_finished = False
        self._grown = asyncio.Condition()

    async def advance(self, num_bytes: int, is_finished: bool = False) -> None:
        """Reports that `num_bytes` have arrived; fewer than before mean a new start, which ends all readers."""
        async with self._grown:
            self.is_finished = self.is_finished or is_finished or num_bytes < self.num_arrived
            self.num_arrived = num_bytes
            self._grown.notify_all()

    async def read(self, offset: int) -> AsyncIterator[bytes]:
        """Yields the bytes from `offset` on as they arrive. Ends early if the download does."""
        with self.path.open("rb") as file:
            file.seek(offset)
            while file.tell() < self.num_bytes:
                async with self._grown:
                    await self._grown.wait_for(lambda: self.is_finished or self.num_arrived > file.tell())
                if not (chunk := file.read(max(0, min(CHUNK_BYTES, self.num_arrived - file.tell())))):
                    return
                yield chunk


class Fetcher:
    """Downloads files. `failures` counts by source the files that it could not serve, `checksum_mismatches` those with
    wrong bytes."""

    def __init__(self, token: str) -> None:
        self.failures: Counter[str] = Counter()
        self.checksum_mismatches: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        """Bytes received, by source."""
        self.downloads: dict[tuple[int, str], Download] = {}
        timeout = httpx.Timeout(STALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.AsyncClient(timeout=timeout, headers=bearer_header(token), trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def fetch_manifest(self, sources: Sequence[str], version: int, sha256: str) -> tuple[Manifest, bytes]:
        """The manifest with that SHA-256, and its bytes. Raises `WeightsError` if no source has it."""
        problems = []
        for source in sources:
            try:
                payload = b"".join(
                    [chunk async for chunk in self._chunks(source, version, MANIFEST_FILE, 0, MAX_MANIFEST_BYTES)]
                )
                manifest = decode_manifest(payload, sha256)
                if manifest.version != version:
                    raise WeightsError(f"the manifest is of version {manifest.version}")
                return manifest, payload
            except (WeightsError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                problems.append(self._note_failure(source, error))
        raise WeightsError(f"version {version}: {'; '.join(problems)}")

    async def fetch_file(
        self,
        sources: Sequence[str],
        version: int,
        name: str,
        path: Path,
        num_bytes: int,
        check: Callable[[Path], None],
    ) -> int:
        """Downloads the version's file `name`, of `num_bytes`, to `path`; returns the number of bytes transferred.

        `check` raises `WeightsError` if the bytes are wrong. Raises `WeightsError` if no source has the right ones.
        After an error or a cancellation no file is left.
        """
        problems: list[str] = []
        num_fetched = 0
        download = self.downloads[version, name] = Download(path, num_bytes)
        path.unlink(missing_ok=True)
        path.touch()
        try:
            for source in sources:
                begun_at = download.num_arrived
                try:
                    await self._continue(download, source, version, name)
                    await asyncio.to_thread(check, path)
                    return num_fetched + num_bytes - begun_at
                except (WeightsError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                    problems.append(self._note_failure(source, error))
                    num_fetched += download.num_arrived - begun_at
                    if isinstance(error, WeightsError):  # several sources may have contributed: fetch all of it again
                        path.write_bytes(b"")
                        await download.advance(0)
            raise WeightsError(f"version {version}, {name}: {'; '.join(problems)}")
        except BaseException:
            path.unlink()
            raise
        finally:
            await download.advance(download.num_arrived, is_finished=True)
            del self.downloads[version, name]

    async def _continue(self, download: Download, source: str, version: int, name: str) -> None:
        with download.path.open("ab") as file:
            async for chunk in self._chunks(source, version, name, download.num_arrived, download.num_bytes):
                file.write(chunk)
                file.flush()
                self.num_bytes[source] += len(chunk)
                await download.advance(download.num_arrived + len(chunk))
        if download.num_arrived != download.num_bytes:
            raise OSError(f"ended after {download.num_arrived} of {download.num_bytes} bytes")

    async def _chunks(self, source: str, version: int, name: str, offset: int, max_bytes: int) -> AsyncIterator[bytes]:
        """Yields the file's bytes from `offset` on; raises `WeightsError` if the file is longer than `max_bytes`."""
        if source.startswith("file:"):
            folder = Path(unquote(urlsplit(source).path))
            chunks = _read(version_folder(folder, version) / name, offset)
        else:
            chunks = self._get(f"{source}/weights/{version}/{name}", offset)
        async for chunk in chunks:
            offset += len(chunk)
            if offset > max_bytes:
                raise WeightsError(f"more than {max_bytes} bytes")
            yield chunk

    async def _get(self, url: str, offset: int) -> AsyncIterator[bytes]:
        async with self._http.stream("GET", url, headers={"Range": f"bytes={offset}-"} if offset else {}) as response:
            if response.status_code != (httpx.codes.PARTIAL_CONTENT if offset else httpx.codes.OK):
                response.raise_for_status()
                raise OSError(f"{url} answered {response.status_code}")
            async for chunk in response.aiter_raw():
                yield chunk

    def _note_failure(self, source: str, error: Exception) -> str:
        (self.checksum_mismatches if isinstance(error, WeightsError) else self.failures)[source] += 1
        kind = "" if isinstance(error, WeightsError) else f"{type(error).__name__}: "
        problem = f"{source}: {kind}{str(error).partition(chr(10))[0]}"
        _log.warning("weights: %s", problem)
        return problem


async def _read(path: Path, offset: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := await asyncio.to_thread(file.read, 8 * CHUNK_BYTES):
            yield chunk


def file_source(folder: Path) -> str:
    """The source URL for a learner's folder of versions on this machine."""
    return folder.resolve().as_uri()
