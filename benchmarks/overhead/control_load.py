"""The load that readers put on control and Redis: pages on /events, bursts on /status, pages that never read.

    python -m benchmarks.overhead.control_load [--seconds 10] [--pages 200] [--requests-per-s 200]

The real control service runs as a separate process, beside a real Redis with an artificial run that continues (a step,
a heartbeat and an event per second). Each phase of `--seconds` measures: CPU time of control, commands that control
sent to Redis (all commands minus those of this benchmark), memory, and the latency of each request from the time when
it was due, so that a late response delays no later request. Pages read in a separate process. Rows go to
benchmarks/results/control_load.json.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil
import redis
from rich.console import Console
from rich.table import Table

from benchmarks.demo import ROOT
from headrace.common.http.addresses import free_port
from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from headrace.launcher.run.processes import REDIS_URL_VARIABLE
from headrace.launcher.run.redis_server import start_redis
from tests.support.seeded_run import heartbeat, seed_run, step_rows

RESULTS = ROOT / "benchmarks" / "results" / "control_load.json"
KEYS = Keys("control-load")
NUM_STEPS = 1000
START_TIMEOUT_S = 120.0
SETTLE_S = 2.0
NUM_CONNECTIONS = 16
Row = dict[str, Any]


class Going(threading.Thread):
    """The continuing run: writes each second's data, and counts its own commands."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.client = redis.Redis.from_url(url)
        self.over = threading.Event()
        self.step = NUM_STEPS
        self.num_commands = 0

    def run(self) -> None:
        while not self.over.wait(1.0):
            self.step += 1
            row = step_rows(self.step, time.time())[-1]
            with self.client.pipeline(transaction=False) as pipe:
                pipe.xadd(KEYS.history, {"kind": "step", "row": msgspec.json.encode(row)})
                pipe.hset(KEYS.learner, mapping={"step": self.step, "weight_version": self.step + 1})
                pipe.set(KEYS.replica("generation-0"), encode(heartbeat("generation-0", "http://a", self.step)), ex=60)
                pipe.xadd(
                    KEYS.events, {"kind": "weight_swap", "event": b'{"replica": "generation-0", "pause_ms": 50.0}'}
                )
                self.num_commands += len(pipe)
                pipe.execute()

    def commands_of_others(self) -> int:
        """Number of commands that Redis has received from others, this query included."""
        self.num_commands += 1
        info: Any = self.client.info("stats")
        return int(info["total_commands_processed"]) - self.num_commands


class Measured:
    """Measures what control and Redis spend while the block runs."""

    def __init__(self, control: psutil.Process, going: Going) -> None:
        self.control, self.going = control, going
        self.row: Row = {}

    @contextlib.contextmanager
    def phase(self, name: str, **asked: int) -> Iterator[Row]:
        commands, cpu, started = self.going.commands_of_others(), self.control.cpu_times(), time.monotonic()
        self.row = {"phase": name, **asked}
        yield self.row
        seconds, now = time.monotonic() - started, self.control.cpu_times()
        spent_s = now.user + now.system - cpu.user - cpu.system
        self.row |= {
            "seconds": seconds,
            "cpu_s_per_s": spent_s / seconds,
            "redis_commands_per_s": (self.going.commands_of_others() - commands) / seconds,
            "rss_mib": self.control.memory_info().rss / 2**20,
            "load_average": os.getloadavg()[0],
        }


@contextlib.contextmanager
def a_control(redis_url: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    token, port = folder / "token", free_port()
    token.write_text("benchmark")
    place = ["--run", KEYS.run, "--token-file", str(token), "--port", str(port)]
    command = [sys.executable, "-m", "headrace.control", *place]
    with (folder / "control.log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | {REDIS_URL_VARIABLE: redis_url}, stderr=log)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_TIMEOUT_S
    try:
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "control.log").read_text())
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/status", timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def pages(url: str, count: int, never_read: bool = False) -> Iterator[dict[str, float]]:
    """`count` connected pages; the yielded dictionary has what they have read, once the block has ended."""
    if not count:
        yield {}
        return
    words = [
        sys.executable,
        "-m",
        "benchmarks.overhead.control_load",
        "--follow",
        url,
        str(count),
        *["--never-read"] * never_read,
    ]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    process.stdout.readline()  # they are connected
    found: dict[str, float] = {}
    try:
        yield found
    finally:
        told, _ = process.communicate("\n")
        found |= json.loads(told)


async def follow(url: str, count: int, never_read: bool) -> None:
    """The process of `pages`."""
    address, num_bytes = urlsplit(url), [0] * count

    async def page(place: int) -> None:
        limit = 1 << 12 if never_read else 1 << 16
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=limit)
        writer.write(f"GET /events HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        while not never_read and (part := await reader.read(1 << 16)):
            num_bytes[place] += len(part)
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(page(place)) for place in range(count)]
    while not never_read and not all(num_bytes):
        await asyncio.sleep(0.05)
    if never_read:
        await asyncio.sleep(SETTLE_S)
    print("connected", flush=True)
    before = sum(num_bytes)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    print(json.dumps({"bytes_per_page": (sum(num_bytes) - before) / count}))
    for task in tasks:
        task.cancel()


async def ask(url: str, path: str, per_s: int, seconds: float) -> Row:
    """Sends requests at a steady rate over persistent connections, and times each from when it was due."""
    address, latencies_ms, errors = urlsplit(url), [], 0
    request = f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
    free: asyncio.Queue[Any] = asyncio.Queue()
    for _ in range(NUM_CONNECTIONS):
        free.put_nowait(await asyncio.open_connection(address.hostname, address.port))
    started, tasks = time.monotonic() + 0.1, []

    async def one(due: float) -> None:
        nonlocal errors
        reader, writer = connection = await free.get()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
        latencies_ms.append(1e3 * (time.monotonic() - due))
        errors += not head.startswith(b"http/1.1 200 ")
        free.put_nowait(connection)

    for number in range(int(per_s * seconds)):
        due = started + number / per_s
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    quantiles = statistics.quantiles(latencies_ms, n=100)
    timings = {"p50_ms": quantiles[49], "p99_ms": quantiles[98], "max_ms": max(latencies_ms)}
    return timings | {"num_requests": len(latencies_ms), "errors": errors}


def measure(arguments: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        service, redis_url = start_redis(folder, folder / "redis.log")
        going = Going(redis_url)
        seed_run(going.client, KEYS, num_steps=NUM_STEPS)
        going.start()
        try:
            with a_control(redis_url, folder) as (url, process):
                return list(phases(url, Measured(process, going), arguments))
        finally:
            going.over.set()
            going.join()
            service.stop(10.0)


def phases(url: str, measured: Measured, arguments: argparse.Namespace) -> Iterator[Row]:
    seconds, rate = arguments.seconds, arguments.rate
    for count in (0, arguments.pages // 4, arguments.pages):
        with pages(url, count) as told:
            time.sleep(SETTLE_S)
            with measured.phase("pages on /events", pages=count) as row:
                time.sleep(seconds)
        yield row | told
    for path, count, per_s in (("/status", 0, rate), ("/status", arguments.pages, rate), ("/history", 0, rate // 10)):
        with (
            pages(url, count) as told,
            measured.phase(f"requests for {path}", pages=count, requests_per_s=per_s) as row,
        ):
            row |= asyncio.run(ask(url, path, per_s, seconds))
        yield row | told
    with pages(url, arguments.pages, never_read=True):
        with measured.phase("pages that never read", pages=arguments.pages) as row:
            time.sleep(seconds)
        yield row


def derive(rows: list[Row]) -> Row:
    """The cost of one more page and of one more request."""
    alone, following, asked = rows[0], rows[2], rows[3]
    page_s = (following["cpu_s_per_s"] - alone["cpu_s_per_s"]) / following["pages"]
    request_s = (asked["cpu_s_per_s"] - alone["cpu_s_per_s"]) * asked["seconds"] / asked["num_requests"]
    return {
        "cpu_us_per_page_and_s": 1e6 * page_s,
        "cpu_us_per_request": 1e6 * request_s,
        "redis_commands_per_s_alone": alone["redis_commands_per_s"],
        "redis_commands_per_s_most": max(row["redis_commands_per_s"] for row in rows),
        "rss_kib_per_page_that_never_reads": 1024 * (rows[-1]["rss_mib"] - rows[-2]["rss_mib"]) / rows[-1]["pages"],
    }


def show(rows: list[Row], derived: Row) -> None:
    table = Table(title="control under load")
    columns = ["phase", "pages", "requests_per_s", "cpu_s_per_s", "redis_commands_per_s", "p50_ms", "p99_ms", "errors"]
    columns += ["rss_mib", "load_average"]
    for column in columns:
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console = Console(width=160)
    console.print(table)
    for name, value in derived.items():
        console.print(f"{name}: {value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead.control_load")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--requests-per-s", dest="rate", type=int, default=200)
    parser.add_argument("--follow", nargs=2, metavar=("URL", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--never-read", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.follow:
        asyncio.run(follow(arguments.follow[0], int(arguments.follow[1]), arguments.never_read))
        return
    rows = measure(arguments)
    derived = derive(rows)
    show(rows, derived)
    asked = {"seconds": arguments.seconds, "pages": arguments.pages, "requests_per_s": arguments.rate}
    found = {"cores": os.cpu_count(), "arguments": asked, "derived": derived, "rows": rows}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
