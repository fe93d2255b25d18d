"""How long a step waits for its version and its checkpoint, and how long both then take beside the next step.

    python -m benchmarks.weights.publish [--millions 1500] [--state-gb 4] [--threads 1 2]

Random bfloat16 weights, in tensors of the shapes of a model with 1.5 billion, of which 0.5, 5 or 25 % change by one
unit in the last place before each version; then float32 state. It uses the learner's own classes and a real Redis.
Measured are: the seconds that the loop waits, next to one `memcpy` of the same bytes into the same memory just before,
as wall time and as processor time; the seconds until the version is announced or the checkpoint is durable; bytes; and
how much a thread that trains a small network is slowed down meanwhile. Torch has one thread. Rows go to
benchmarks/results/publish.json.
"""

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.demo import ROOT, this_machine
from headrace.common.process.waiting import Reason, Waits
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.weights.files import DELTA_FILE, MODEL_FILE, version_folder
from headrace.launcher.run.redis_server import start_redis
from headrace.learner.checkpoints.checkpoint import num_bytes_in, save_checkpoint
from headrace.learner.checkpoints.record import CheckpointRecord
from headrace.learner.distributed.state_files import write_state
from headrace.learner.model.host_snapshots import Snapshot, SnapshotPool
from headrace.learner.stages.background import BackgroundWorker
from headrace.learner.stages.wait_deadlines import WaitDeadlines
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor
from headrace.learner.weights.publisher import WeightVersions
from headrace.learner.weights.version_writer import VersionWriter

RESULTS = ROOT / "benchmarks" / "results" / "publish.json"
SHARES = (0.005, 0.05, 0.25)
LAYER: dict[str, tuple[int, ...]] = {"q": (1536, 1536), "k": (256, 1536), "v": (256, 1536), "o": (1536, 1536)}
LAYER |= {"gate": (8960, 1536), "up": (8960, 1536), "down": (1536, 8960), "norm": (1536,)}
EMBEDDINGS = (151_936, 1536)
BLOCK = 1 << 24
"""Number of distinct random numbers; zstd does not notice the repetition."""
MEMCPY_REPEATS = 3
TRAIN_S = 3.0
"""How long the training thread is timed without other work."""
COLUMNS = ["", "threads", "GB", "memcpy, s", "held up, s", "of a memcpy (processor)", "done after, s", "GB written"]
COLUMNS += ["training slowed by"]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights.publish")
    parser.add_argument("--millions", type=float, default=1500, help="millions of weights")
    parser.add_argument("--state-gb", type=float, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="headrace-publish-") as name:
        folder = Path(name)
        service, url = start_redis(folder, folder / "redis.log")
        try:
            rows = [
                row
                for num_threads in arguments.threads
                for row in publications(folder, url, int(arguments.millions * 1e6), num_threads)
            ]
        finally:
            service.stop(10.0)
        rows.append(checkpoint(folder, int(arguments.state_gb * 1e9)))
    machine = this_machine() | {"load_average": os.getloadavg(), "torch_threads": torch.get_num_threads()}
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    report(rows, Console(highlight=False, width=140))


def made_weights(num_items: int) -> dict[str, Tensor]:
    """Embeddings and as many layers as needed, filled with the same few million random numbers repeatedly."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    found, left = dict[str, Tensor](), num_items
    layers = {f"layers.{n}.{name}": shape for n in range(999) for name, shape in LAYER.items()}
    for name, shape in ({"embeddings": EMBEDDINGS} | layers).items():
        rows = min(shape[0], -(-left * shape[0] // int(np.prod(shape))))
        if rows <= 0:
            break
        found[name] = torch.empty((rows, *shape[1:]), dtype=torch.bfloat16)
        for part in found[name].view(-1).split(BLOCK):
            part.copy_(block[: len(part)])
        left -= found[name].numel()
    return found


def change(weights: Mapping[str, Tensor], share: float) -> None:
    """Moves a random `share` by one unit up or down, in place."""
    chance = torch.empty(BLOCK, dtype=torch.int16).random_(0, 1 << 15)
    block = ((chance < share * (1 << 15)) * (1 - 2 * (chance & 1))).to(torch.int16)
    for tensor in weights.values():
        for part in tensor.view(-1).view(torch.int16).split(BLOCK):
            part.add_(block[: len(part)])


def publications(folder: Path, url: str, num_items: int, num_threads: int) -> list[Row]:
    """Rows of publications, after two that allocate the memory which later ones reuse."""
    weights, waits = made_weights(num_items), Waits()
    versions = WeightVersions(folder / f"weights-{num_threads}", LearnerStore(connect(url), Keys("publish")), "", "")
    versions._writer = VersionWriter("benchmark", num_threads)
    worker = BackgroundWorker("publish", WaitDeadlines(waits, None, None, None), Reason.WAITING_FOR_PUBLISH)  # type: ignore[arg-type]
    for step in range(2):
        versions.publish(versions.snapshot(weights), step, versions.reserve())
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    alone, rows, announced_s = trained_alone(), list[Row](), list[float]()

    def publish(snapshot: Snapshot, step: int) -> None:
        versions.publish(snapshot, step, versions.reserve())
        announced_s.append(time.perf_counter())

    for step, share in enumerate(SHARES, start=2):
        change(weights, share)
        times = memcpy(weights, versions._snapshots._free[-1])
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        snapshot = versions.snapshot(weights)
        worker.begin(partial(publish, snapshot, step))
        times |= {"held_up_s": time.perf_counter() - began_s, "held_up_cpu_s": time.thread_time() - began_cpu_s}
        meanwhile = trained_a_second(lambda _: worker.is_busy)
        del snapshot
        files = [version_folder(versions.root, versions.current) / name for name in (DELTA_FILE, MODEL_FILE)]
        row = {"kind": "version", "threads": num_threads, "changed": share, "bytes": num_bytes, **times}
        row |= {"done_s": announced_s[-1] - began_s, "slowed": 1 - meanwhile / alone}
        rows.append(row | {"sent_bytes": min(path.stat().st_size for path in files if path.exists())})
    worker.close()
    versions.close()
    return rows


def memcpy(tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Row:
    """Wall seconds and processor seconds, each the median of a few copies."""
    times = []
    for _ in range(MEMCPY_REPEATS):
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        for name, tensor in tensors.items():
            ctypes.memmove(memory[name].data_ptr(), tensor.data_ptr(), tensor.nbytes)
        times.append((time.perf_counter() - began_s, time.thread_time() - began_cpu_s))
    wall_s, cpu_s = (statistics.median(part) for part in zip(*times, strict=True))
    return {"memcpy_s": wall_s, "memcpy_cpu_s": cpu_s}


def trained_alone() -> float:
    trained_a_second(lambda _: False)  # what is loaded once
    return trained_a_second(lambda spent_s: spent_s < TRAIN_S)


def trained_a_second(goes_on: Callable[[float], bool]) -> float:
    """Updates per second of a small network by this thread; `goes_on` is called with the seconds since the first
    one."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    optimizer, batch = torch.optim.AdamW(network.parameters()), torch.randn(256, 256)
    began_s, num_updates = time.perf_counter(), 0
    while goes_on(time.perf_counter() - began_s) or not num_updates:
        network(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        num_updates += 1
    return num_updates / (time.perf_counter() - began_s)


def checkpoint(folder: Path, num_bytes: int) -> Row:
    num_tensors = max(1, num_bytes // (1 << 28))
    state = {f"master.{n}": torch.randn(num_bytes // num_tensors // 4) for n in range(num_tensors)}
    snapshots = SnapshotPool()
    snapshots.take(state)
    times = memcpy(state, snapshots._free[-1])
    record = CheckpointRecord(1, 1, 1, Cursor(0, 0), {}, [], [], [], {}, 0.0)
    alone = trained_alone()
    worker = BackgroundWorker("checkpoint", WaitDeadlines(Waits(), None, None, None), Reason.WAITING_FOR_CHECKPOINT)  # type: ignore[arg-type]
    began_s, began_cpu_s = time.perf_counter(), time.thread_time()
    copied = snapshots.take(state)
    saved: list[tuple[Path, float]] = []

    def write() -> None:
        path = save_checkpoint(folder / "checkpoints", record, lambda place: write_state(place, copied.tensors))
        saved.append((path, time.perf_counter() - began_s))

    worker.begin(write)
    times |= {"held_up_s": time.perf_counter() - began_s, "held_up_cpu_s": time.thread_time() - began_cpu_s}
    meanwhile = trained_a_second(lambda _: worker.is_busy)
    worker.close()
    path, done_s = saved[0]
    row = {"kind": "checkpoint", "bytes": num_bytes, **times}
    return row | {"done_s": done_s, "slowed": 1 - meanwhile / alone, "sent_bytes": num_bytes_in(path)}


def report(rows: list[Row], console: Console) -> None:
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        is_version = row["kind"] == "version"
        table.add_row(
            f"{row['changed']:.1%} changed" if is_version else "a checkpoint",
            str(row.get("threads", "")),
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['memcpy_s']:.2f}",
            f"{row['held_up_s']:.2f}",
            f"{row['held_up_s'] / row['memcpy_s']:.2f} ({row['held_up_cpu_s'] / row['memcpy_cpu_s']:.2f})",
            f"{row['done_s']:.1f}",
            f"{row['sent_bytes'] / 1e9:.3f}",
            f"{row['slowed']:.0%}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
