"""The cost of durability: bytes in Redis, the commit of a group, checkpoints and acknowledgements.

    python -m benchmarks.overhead.durability [--repeats 3] [--steps 40]

Three measurements, each against the same without durability, in turns on the same machine: (1) the bytes of Redis's
memory that a group takes in its stream and a finished ticket in the ledger; (2) the milliseconds of a replica's commit
with `appendfsync always` and without an append-only file; (3) the steps per second of a learner that replays a
recording with a checkpoint every 20 steps, acknowledgements and a durable Redis, and without any of them. Rows go to
benchmarks/results/durability.json.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.demo import RECIPE, ROOT
from headrace.common.config import load_recipe
from headrace.common.redis.client import connect, connect_async
from headrace.common.redis.keys import Keys
from headrace.common.wire import Group, Rollout, Sampling, Ticket, Timings, VersionSpan, encode
from headrace.generation.tickets.store import TicketStore
from headrace.launcher.run.redis_server import start_redis
from headrace.learner.intake.recordings import Header, RecordedGroup, RecordingWriter
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor, Settlement

RESULTS = ROOT / "benchmarks" / "results" / "durability.json"
SHAPES = {"demo: 8 x 14 tokens": (8, 14), "16 x 1,000 tokens": (16, 1000)}
NUM_SAMPLED = 300
NUM_FINISHED = 10_000
"""Enough that Redis stores the ledger as a hash table, as in a long run."""
NUM_COMMITS = 1000
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead.durability")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="headrace-durability-") as folder:
        rows += [bytes_in_redis(Path(folder), name, *shape) for name, shape in SHAPES.items()]
        for repeat in range(arguments.repeats):
            place = Path(folder) / str(repeat)
            rows += [commits(place, is_durable) for is_durable in (True, False)]
        recording = synthetic_recording(Path(folder) / "recording", arguments.steps)
        for repeat in range(arguments.repeats):
            place = Path(folder) / str(repeat)
            rows += [replay(place, recording, arguments.steps, is_durable) for is_durable in (True, False)]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    report(rows, Console(highlight=False, width=110))


@contextmanager
def redis_server(folder: Path, is_durable: bool) -> Iterator[str]:
    service, url = start_redis(folder / "redis", folder / "redis.log")
    try:
        if not is_durable:
            connect(url).config_set("appendonly", "no")
        yield url
    finally:
        service.stop(30.0)


def bytes_in_redis(folder: Path, name: str, num_rollouts: int, num_tokens: int) -> Row:
    with redis_server(folder / f"bytes-{num_tokens}", True) as url:
        client, keys = connect(url), Keys("bytes")
        store, rng = LearnerStore(client, keys), random.Random(0)
        before = client.info("memory")["used_memory"]
        groups = [random_group(rng, place, num_rollouts, num_tokens) for place in range(NUM_SAMPLED)]
        payloads = [(group.ticket.id, encode(group)) for group in groups]
        store.add_groups(payloads, Cursor(0, 0))
        waiting = client.info("memory")["used_memory"] - before
        store.settle([Settlement(keys.groups, "0-1", f"0-{place}", "trained") for place in range(NUM_FINISHED)])
        ledger = client.memory_usage(keys.ledger, samples=0)
    return {
        "kind": "bytes",
        "group": name,
        "payload_bytes": sum(len(payload) for _, payload in payloads) / NUM_SAMPLED,
        "bytes_per_group": waiting / NUM_SAMPLED,
        "ledger_bytes_per_ticket": ledger / NUM_FINISHED,
    }


def commits(folder: Path, is_durable: bool) -> Row:
    """Times of one replica that commits groups one after another."""
    rng = random.Random(1)
    with redis_server(folder / f"commit-{is_durable}", is_durable) as url:
        keys = Keys("commits")
        groups = [random_group(rng, place, 8, 14) for place in range(NUM_COMMITS)]
        LearnerStore(connect(url), keys).add_tickets(keys.tickets, [group.ticket for group in groups])

        async def commit_all() -> list[float]:
            client = connect_async(url)
            store = TicketStore(client, keys, "r")
            await store.open()
            times = []
            by_id = {group.ticket.id: group for group in groups}
            for lease in await store.lease(keys.tickets, NUM_COMMITS, 1.0):
                started = time.perf_counter()
                assert await store.commit(lease, by_id[lease.ticket.id])
                times.append(time.perf_counter() - started)
            await client.aclose()
            return times

        times = asyncio.run(commit_all())
    return {
        "kind": "commit",
        "is_durable": is_durable,
        "p50_ms": float(np.percentile(times, 50)) * 1e3,
        "p95_ms": float(np.percentile(times, 95)) * 1e3,
        "per_s": NUM_COMMITS / sum(times),
    }


def replay(folder: Path, recording: Path, num_steps: int, is_durable: bool) -> Row:
    settings = [] if is_durable else ["durability=relaxed", "learner.checkpoint_interval_steps=1000000"]
    with redis_server(folder / f"replay-{is_durable}", is_durable) as url:
        run = folder / f"run-{is_durable}"
        command = [sys.executable, "-m", "headrace.learner", "--replay", str(recording), "--run", run.name]
        chosen = [part for setting in settings for part in ("--set", setting)]
        subprocess.run(
            [*command, "--runs-folder", str(folder), *chosen],
            env=os.environ | {"HEADRACE_REDIS_URL": url},
            check=True,
            capture_output=True,
        )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == num_steps, f"{len(steps)} steps, expected {num_steps}"
    span = steps[-1]["time_s"] - steps[0]["time_s"]
    return {"kind": "replay", "is_durable": is_durable, "steps_per_s": (num_steps - 1) / span}


def synthetic_recording(path: Path, num_steps: int) -> Path:
    """Groups of the demo's shape, none uniform and all fresh, enough for `num_steps` steps."""
    config = load_recipe(RECIPE, [f"learner.steps={num_steps}", "learner.stale_policy=train"]).config
    writer, rng = RecordingWriter(path, Header("synthetic", config.model_dump(mode="json"))), random.Random(2)
    writer.add_versions({1: 0})
    for place in range(num_steps * config.learner.groups_per_step):
        group = random_group(rng, place, config.actor.group_size, 14)
        writer.add(RecordedGroup(f"{place + 1}-0", group.ticket.id, encode(group)))
    writer.close()
    return path


def random_group(rng: random.Random, place: int, num_rollouts: int, num_tokens: int) -> Group:
    ticket = Ticket(
        id=f"0-{place}",
        kind="train",
        prompt_tokens=[rng.randrange(2, 500) for _ in range(30)],
        messages=[{"role": "user", "content": "Ann has 3 pens and buys 4 more. How many pens has she now?"}],
        reference={"answer": "7"},
        num_completions=num_rollouts,
        sampling=Sampling(1.0, max(40, num_tokens), [1]),
        min_weight_version=1,
    )
    rollouts = [
        Rollout.of_completion(
            tokens=np.array([rng.randrange(2, 500) for _ in range(num_tokens)], np.int32),
            behaviour_logprobs=np.array([-rng.random() for _ in range(num_tokens)], np.float32),
            version_spans=[VersionSpan(1, 0, num_tokens)],
            reward=float(index % 2),
            finish_reason="stop",
            text="x" * (3 * num_tokens),
        )
        for index in range(num_rollouts)
    ]
    return Group(ticket, rollouts, "generation-0", Timings(1.0, 2.0, 3.0))


def report(rows: list[Row], console: Console) -> None:
    for row in rows:
        if row["kind"] == "bytes":
            console.print(
                f"{row['group']}: {row['bytes_per_group']:,.0f} bytes of Redis's memory a waiting group "
                f"({row['payload_bytes']:,.0f} of them its payload), {row['ledger_bytes_per_ticket']:.0f} bytes a "
                "finished ticket"
            )
    for kind, value in (("commit", "per_s"), ("replay", "steps_per_s")):
        durable = [row[value] for row in rows if row["kind"] == kind and row["is_durable"]]
        without = [row[value] for row in rows if row["kind"] == kind and not row["is_durable"]]
        ratios = sorted(a / b for a, b in zip(durable, without, strict=True))
        console.print(
            f"{kind}: {np.median(durable):.2f} against {np.median(without):.2f} {value} without durability: "
            f"{np.median(ratios):.3f} of it ({ratios[0]:.3f} to {ratios[-1]:.3f} over {len(ratios)} turns)"
        )
    times = [row for row in rows if row["kind"] == "commit"]
    for is_durable in (True, False):
        p50 = np.median([row["p50_ms"] for row in times if row["is_durable"] == is_durable])
        p95 = np.median([row["p95_ms"] for row in times if row["is_durable"] == is_durable])
        console.print(f"commit {'durable' if is_durable else 'without'}: p50 {p50:.2f} ms, p95 {p95:.2f} ms")


if __name__ == "__main__":
    main()
