"""Replicas without engines: their real copies of the weights, fetching from a learner, from each other, or from
sources that fail."""

import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Literal

import torch

from headrace.common.http.addresses import listen, socket_url
from headrace.common.http.service import new_app, serve_in_loop
from headrace.common.weights.files import (
    MODEL_FILE,
    Manifest,
    encode_manifest,
    sha256_hex,
    version_file,
    version_folder,
)
from headrace.generation.weights.downloads import Fetcher
from headrace.generation.weights.local_weights import LocalWeights
from headrace.generation.weights.peer_api import WeightFileServer, weights_router
from headrace.generation.weights.published_version import PublishedVersion
from headrace.generation.weights.version_fetch import FetchedVersion, fetch_version
from headrace.learner.model.host_snapshots import Snapshot
from headrace.learner.weights.version_writer import VersionWriter
from tests.support.fake_sglang import ScriptedServer, in_a_thread
from tests.support.guard import GUARD_S

TOKEN = "secret"
Fault = Literal["", "absent", "garbage", "truncated", "stalls", "endless", "refuses ranges"]


class Versions:
    """Versions of small steps, written as the learner writes them, in the folder `root`."""

    def __init__(self, root: Path, num_items: int = 20_000, share: float = 0.01, seed: int = 0) -> None:
        self.root = root
        self.share = share
        self.writer = VersionWriter("test")
        self.manifests: list[Manifest] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._bits = torch.randint(0, 2**14, (num_items,), dtype=torch.int16, generator=self._generator)
        root.mkdir(parents=True, exist_ok=True)

    def publish(self, memory: Path | None = None) -> int:
        """`memory`: all that is published lies there."""
        version = len(self.manifests) + 1
        self._bits += (torch.rand(self._bits.shape, generator=self._generator) < self.share).to(torch.int16)
        self.tensors = {"w": self._bits.view(torch.bfloat16).clone(), "bias": torch.full((3,), float(version))}
        weights, is_shared = Snapshot(self.tensors), memory is not None
        memory = memory and version_folder(memory, version)
        if memory is not None:
            memory.mkdir()
        folder = version_folder(self.root, version)
        self.manifests.append(self.writer.write(folder, version, version, weights, memory, is_memory_only=is_shared))
        return version

    def published(self, url: str, version: int | None = None) -> PublishedVersion:
        manifest = self.manifests[(version or len(self.manifests)) - 1]
        return PublishedVersion(manifest.version, sha256_hex(encode_manifest(manifest)), url)


class Member:
    """What one replica has of the weights."""

    def __init__(self, model_folder: Path) -> None:
        self.local = LocalWeights(model_folder)
        self.fetcher = Fetcher(TOKEN)
        self.file_server = WeightFileServer(self.local, self.fetcher)

    async def take(self, published: PublishedVersion, *peers: str) -> FetchedVersion:
        fetched = await fetch_version(self.local, self.fetcher, published, peers)
        self.local.activate(fetched.local)
        return fetched

    @property
    def model(self) -> bytes:
        return (self.local.current_folder / MODEL_FILE).read_bytes()

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        app, sock = new_app("member"), listen("127.0.0.1", 0)
        app.include_router(weights_router(self.file_server, TOKEN))
        async with serve_in_loop(app, sock):
            yield socket_url(sock)

    async def close(self) -> None:
        await self.fetcher.aclose()
        self.local.close()


@contextlib.asynccontextmanager
async def members(model_folder: Path, count: int = 1) -> AsyncIterator[list[Member]]:
    found = [Member(model_folder) for _ in range(count)]
    try:
        yield found
    finally:
        for member in found:
            await member.close()


class Source(ScriptedServer):
    """Serves the files of `root`, each with the fault that `faults` names for it; `requests` are what it was asked."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, str]] = []
        self.num_bytes = 0
        self.bytes_per_s = float("inf")
        self.sends_whole_models = threading.Event()
        """Until it is set, the second half of a model's file waits."""
        self.sends_whole_models.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Source

    def do_GET(self) -> None:
        _, _, version, name = self.path.split("/")
        byte_range = self.headers.get("Range", "")
        self.server.requests.append((name, byte_range))
        fault = self.server.faults.get(name, "")
        path = version_file(self.server.root, int(version), name)
        if path is None or fault == "absent" or self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send_error(404)
            return
        first = 0 if fault == "refuses ranges" else int(byte_range.removeprefix("bytes=").rstrip("-") or 0)
        content = path.read_bytes()[first:]
        if fault == "garbage":
            content = bytes(len(content))
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) if fault != "endless" else 1 << 50))
        self.end_headers()
        with contextlib.suppress(OSError):
            self._send(content[: len(content) // 2])
            if name == MODEL_FILE:
                self.server.sends_whole_models.wait(GUARD_S)
            if fault not in ("truncated", "stalls"):
                self._send(content[len(content) // 2 :])
            if fault == "stalls":
                self.server.closing.wait(GUARD_S)
            while fault == "endless" and not self.server.closing.is_set():
                self._send(bytes(1 << 16))
        if fault == "truncated":
            self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, content: bytes) -> None:
        for first in range(0, len(content), 4096):
            part = content[first : first + 4096]
            self.wfile.write(part)
            self.server.num_bytes += len(part)
            if self.server.bytes_per_s < float("inf"):
                time.sleep(len(part) / self.server.bytes_per_s)

    def log_message(self, *_: object) -> None:
        pass


def a_source(root: Path) -> contextlib.AbstractContextManager[Source]:
    return in_a_thread(Source(root))
