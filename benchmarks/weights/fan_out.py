"""The time in which a weight version reaches many replicas, and a replica on the learner's machine.

    python -m benchmarks.weights.fan_out [--replicas 8] [--millions 10] [--megabytes-per-s 20]

The learner's real HTTP service behind a relay with a limited total bandwidth, and replicas without engines that keep
real copies of the weights, each with its own port. All replicas fetch every version, an anchor and then deltas, at the
same time: once from the sources that the learner names (a tree of replicas), and once all from the learner. Then one
replica fetches the same versions over HTTP without a bandwidth limit, and from the learner's folder. Rows go to
benchmarks/results/fan_out.json.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.demo import ROOT
from benchmarks.weights.encodings import random_pair
from headrace.common.hardware.device import machine_id
from headrace.common.http.addresses import listen, socket_url
from headrace.common.http.service import new_app, serve_in_loop, serve_in_thread
from headrace.common.weights.files import encode_manifest, sha256_hex, version_folder
from headrace.generation.weights.downloads import Fetcher
from headrace.generation.weights.local_weights import LocalWeights
from headrace.generation.weights.peer_api import WeightFileServer, weights_router
from headrace.generation.weights.published_version import PublishedVersion
from headrace.generation.weights.version_fetch import fetch_version
from headrace.learner.model.host_snapshots import Snapshot
from headrace.learner.reporting.http_api import make_app
from headrace.learner.steering.switches import Switches
from headrace.learner.weights.publisher import ancestors_in_tree
from headrace.learner.weights.version_writer import VersionWriter

RESULTS = ROOT / "benchmarks" / "results" / "fan_out.json"
TOKEN = "benchmark"
NUM_DELTAS = 3
PIECE_BYTES = 1 << 14
Row = dict[str, Any]


class Relay:
    """Forwards connections to `port`; limits the returned bytes to `bytes_per_s` in total, and counts them."""

    def __init__(self, port: int, bytes_per_s: float) -> None:
        self.port = port
        self.bytes_per_s = bytes_per_s
        self.num_bytes = 0
        self._free_at = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.port)
            asking = asyncio.create_task(self._pass_on(reader, there_writer, False))
            await self._pass_on(there_reader, writer, True)
            asking.cancel()
            there_writer.close()
        writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_capped: bool) -> None:
        while piece := await reader.read(PIECE_BYTES):
            if is_capped:
                self.num_bytes += len(piece)
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + len(piece) / self.bytes_per_s
                await asyncio.sleep(self._free_at - now)
            writer.write(piece)
            await writer.drain()


class Replica:
    def __init__(self, model_folder: Path) -> None:
        self.local = LocalWeights(model_folder)
        self.fetcher = Fetcher(TOKEN)

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        app, sock = new_app("replica"), listen("127.0.0.1", 0)
        app.include_router(weights_router(WeightFileServer(self.local, self.fetcher), TOKEN))
        async with serve_in_loop(app, sock):
            yield socket_url(sock)
        await self.fetcher.aclose()
        self.local.close()

    async def take(self, published: PublishedVersion, peers: list[str]) -> None:
        fetched = await fetch_version(self.local, self.fetcher, published, peers)
        self.local.activate(fetched.local)


def write_versions(root: Path, num_items: int) -> list[PublishedVersion]:
    """Writes an anchor, and deltas in which 1.5 % of the weights change by one unit."""
    root.mkdir()
    writer, found = VersionWriter("benchmark"), []
    after, before = random_pair(num_items, 0.015)
    for version in range(1, NUM_DELTAS + 2):
        bits = before if version % 2 else after
        tensor = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        manifest = writer.write(version_folder(root, version), version, version, Snapshot({"weights": tensor}))
        found.append(PublishedVersion(version, sha256_hex(encode_manifest(manifest)), ""))
    return found


async def spread(
    way: str, versions: list[PublishedVersion], num_replicas: int, relay: Relay, url: str, folder: Path
) -> list[Row]:
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        replicas = [Replica(folder) for _ in range(num_replicas)]
        urls = [await stack.enter_async_context(replica.served()) for replica in replicas]
        for published in versions:
            relay.num_bytes, began_s = 0, time.monotonic()
            asked = published._replace(url=url)
            if way == "folder":
                asked = asked._replace(machine=machine_id(), folder=str(folder.parent / "weights"))
            above = [
                [urls[one] for one in ancestors_in_tree(place)] if way == "tree" else [] for place in range(len(urls))
            ]
            await asyncio.gather(*(one.take(asked, named) for one, named in zip(replicas, above, strict=True)))
            took_s = time.monotonic() - began_s
            came = sum(sum(replica.fetcher.num_bytes.values()) for replica in replicas)
            row = {"way": way, "replicas": num_replicas, "version": published.version, "seconds": took_s}
            rows.append(row | {"learner_bytes": relay.num_bytes, "replica_bytes": came / num_replicas})
            for replica in replicas:
                replica.fetcher.num_bytes.clear()
    return rows


async def measure(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    versions = write_versions(folder / "weights", int(arguments.millions * 1e6))
    model_folder = folder / "model"
    model_folder.mkdir()
    sock = listen("127.0.0.1", 0)
    rows = []
    with serve_in_thread(make_app(folder / "weights", dict, Switches(), TOKEN), sock):
        relay = Relay(sock.getsockname()[1], arguments.megabytes_per_s * 1e6)
        async with await asyncio.start_server(relay.serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            for way in ("tree", "learner"):
                rows += await spread(way, versions, arguments.replicas, relay, url, model_folder)
        for way in ("HTTP", "folder"):
            rows += await spread(way, versions, 1, relay, socket_url(sock), model_folder)
    return rows


def report(rows: list[Row], console: Console) -> None:
    table = Table("from", "replicas", "version", "until all have it, s", "learner sent", "copies", "each fetched")
    for row in rows:
        is_relayed = row["replicas"] > 1
        kind = "anchor" if row["version"] == 1 else "delta"
        table.add_row(
            row["way"],
            str(row["replicas"]),
            f"{row['version']} ({kind})",
            f"{row['seconds']:.3f}",
            f"{row['learner_bytes']:,}" if is_relayed else "",
            f"{row['learner_bytes'] / row['replica_bytes']:.2f}" if is_relayed else "",
            f"{row['replica_bytes']:,.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights.fan_out")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--millions", type=float, default=10, help="millions of bfloat16 weights")
    parser.add_argument("--megabytes-per-s", type=float, default=20, help="bandwidth of the learner's port")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-fan-out-") as folder:
        rows = asyncio.run(measure(arguments, Path(folder)))
    RESULTS.write_text(json.dumps({"arguments": vars(arguments), "rows": rows}, indent=1) + "\n")
    report(rows, Console(highlight=False, width=120))


if __name__ == "__main__":
    main()
