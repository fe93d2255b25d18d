"""What a weight swap costs requests in flight, by swap mode: `python -m benchmarks.swap_modes [--repeats 2]`.

Both modes in turns on one engine that serves both (no overlap schedule, no radix cache), beside the same work without
swaps: groups of the demo's policy, of the demo's length (about 14 tokens, ended by itself) and of 512 tokens (its end
token ignored), a new version every `--interval` seconds. A version moves each weight by a normal step of `lr`, about
what one AdamW update does. Reported: tokens per second and the share lost to swaps; tokens the engine prefilled beyond
the prompts, per version; the pause; and how far the behaviour log-probabilities of tokens after a swap are from an
exact forward pass under the version that they are labelled with, also as importance weights. Last, the same on an
engine as `retract` starts it, with its overlap schedule. Rows go to benchmarks/results/swap_modes.json.
"""

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.demo import ROOT, cpu_model
from benchmarks.logprob_gap import Prompted, gaps
from common.config import EngineConfig
from common.tasks.arithmetic import Arithmetic
from common.wire import Sampling, Ticket
from services.generation.completions import Completion, Sample, generate_body, to_completion
from services.generation.engine import Engine, SwapTimings
from services.generation.engine_server import EngineServer
from services.generation.swapping import SwapMode
from services.learner.policy import load_tokenizer

POLICY = ROOT / "assets" / "demo-policy"
RESULTS = ROOT / "benchmarks" / "results" / "swap_modes.json"
LRS = (1e-3, 1e-4)
NUM_STEPS = 8
"""Versions of a random walk, which is walked to and fro."""
GROUP_SIZE = 8
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """`num_groups` groups with `num_in_flight` at a time; `ends`: at the end token, not only at `max_new_tokens`."""

    name: str
    num_groups: int
    num_in_flight: int
    max_new_tokens: int
    ends: bool


SHAPES = [Shape("demo, ~14 tokens", 160, 16, 40, True), Shape("512 tokens", 4, 4, 512, False)]


@dataclass
class Walk:
    """Which folder of weights each version of one engine has been."""

    root: Path
    version: int = 1
    folders: dict[int, Path] = field(default_factory=dict)
    place: int = 0

    def next(self, lr: float) -> tuple[Path, int]:
        self.place += 1
        self.version += 1
        to_and_fro = self.place % (2 * NUM_STEPS - 2)
        folder = self.root / f"{lr:g}-{min(to_and_fro, 2 * NUM_STEPS - 2 - to_and_fro)}"
        self.folders[self.version] = folder
        return folder, self.version


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap_modes")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each kind and learning rate")
    parser.add_argument("--interval", type=float, default=1.2, help="seconds between versions: the demo's step")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the groups")
    arguments = parser.parse_args()
    machine: Row = {"cores": os.cpu_count(), "cpu": cpu_model(), "python": platform.python_version()}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="headrace-swap-modes-") as folder:
        for lr in LRS:
            write_walk(Path(folder), lr)
        launches: list[tuple[SwapMode, list[SwapMode | None]]] = [
            ("in_place", [None, "retract", "in_place"]),
            ("retract", [None, "retract"]),
        ]
        for launch, modes in launches:
            lrs = LRS * arguments.repeats if launch == "in_place" else LRS[:1]
            turns = [(lr, shape, mode) for lr in lrs for shape in SHAPES for mode in modes]
            rows += asyncio.run(measure(launch, turns, Path(folder), arguments.interval, arguments.scale))
    machine["load_average"] = os.getloadavg()
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    report(rows, Console(highlight=False, width=190))


def write_walk(root: Path, lr: float) -> None:
    """Folders of `NUM_STEPS` versions, each a normal step of `lr` from the one before."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(POLICY / "model.safetensors")
    for step in range(NUM_STEPS):
        folder = root / f"{lr:g}-{step}"
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        weights = {name: w + lr * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


async def measure(
    launch: SwapMode, turns: list[tuple[float, Shape, SwapMode | None]], root: Path, interval_s: float, scale: float
) -> list[Row]:
    """Turn after turn on one server, the first of them twice, for it to warm up."""
    server = EngineServer(EngineConfig(device="cpu", swap_mode=launch), "float32", root / "sglang.log")
    await server.start(POLICY, 1)
    walk, rows = Walk(root), []
    try:
        for place, (lr, shape, mode) in enumerate([turns[0], *turns]):
            engine = Engine(server.url, swap_mode=mode or "retract")
            row, completions = await take_turn(engine, walk, lr, shape, mode, interval_s, scale)
            await engine.aclose()
            if place > 0:
                rows.append({"launch": launch, **row, **gaps(completions, walk.folders, POLICY)})
                print(json.dumps(rows[-1]), flush=True)
    finally:
        await server.stop()
    return rows


async def take_turn(
    engine: Engine, walk: Walk, lr: float, shape: Shape, mode: SwapMode | None, interval_s: float, scale: float
) -> tuple[Row, Prompted]:
    await engine.swap(*walk.next(lr))
    tickets = list(make_tickets(shape, max(1, round(shape.num_groups * scale))))
    num_prefilled, started_s, ended = await prefilled_tokens(engine), time.monotonic(), asyncio.Event()
    swapping = asyncio.create_task(keep_swapping(engine, walk, lr, interval_s if mode else None, ended))
    slots = asyncio.Semaphore(shape.num_in_flight)
    groups = await asyncio.gather(*(answer(engine, ticket, shape, slots) for ticket in tickets))
    wall_s = time.monotonic() - started_s
    ended.set()
    timings = await swapping
    num_recomputed = await prefilled_tokens(engine) - num_prefilled
    num_recomputed -= sum(len(ticket.prompt_tokens) for ticket in tickets) * GROUP_SIZE
    completions = [(t.prompt_tokens, c) for t, group in zip(tickets, groups, strict=True) for c in group]
    num_tokens = sum(len(completion.tokens) for _, completion in completions)
    pauses_ms = [timing.pause_s * 1e3 for timing in timings]
    row = {"shape": shape.name, "mode": mode or "no swaps", "lr": lr, "num_tokens": num_tokens, "wall_s": wall_s}
    row |= {"tokens_per_s": num_tokens / wall_s, "num_swaps": len(timings), "pauses_ms": pauses_ms}
    row |= {"confirm_ms": [timing.confirm_s * 1e3 for timing in timings], "num_recomputed": num_recomputed}
    return row, completions


def make_tickets(shape: Shape, count: int) -> Iterator[Ticket]:
    tokenizer, prompts = load_tokenizer(str(POLICY)), Arithmetic().prompts("train", seed=0, epoch=0)
    sampling = Sampling(1.0, shape.max_new_tokens, [tokenizer.eos_token_id] if shape.ends else [])
    for place, prompt in zip(range(count), prompts, strict=False):
        text = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        yield Ticket(f"0-{place}", "train", tokens, [], {}, GROUP_SIZE, sampling, 0)


async def answer(engine: Engine, ticket: Ticket, shape: Shape, slots: asyncio.Semaphore) -> list[Completion]:
    """As `Engine.generate`, but that the end token may be ignored."""
    request = uuid.uuid4().hex
    body = generate_body(ticket, [f"{request}-{index}." for index in range(GROUP_SIZE)])
    body["sampling_params"]["ignore_eos"] = not shape.ends
    async with slots:
        samples = await engine.calls.call("/generate", list[Sample], body, timeout_s=None)
    return [to_completion(sample) for sample in samples]


async def keep_swapping(
    engine: Engine, walk: Walk, lr: float, interval_s: float | None, ended: asyncio.Event
) -> list[SwapTimings]:
    timings: list[SwapTimings] = []
    while not ended.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await ended.wait()
                break
        timings.append(await engine.swap(*walk.next(lr)))
    return timings


async def prefilled_tokens(engine: Engine) -> int:
    """That the engine has computed in prefills since its start, by its own count."""
    async with httpx.AsyncClient(base_url=engine.url, trust_env=False) as http:
        return int((await http.get("/v1/loads")).json()["loads"][0]["total_prefill_uncached_tokens"])


def report(rows: list[Row], console: Console) -> None:
    table = Table(title="Swaps in flight, by mode")
    columns: dict[str, Callable[[list[Row], float], str]] = {
        "tokens/s": lambda r, _: f"{rate(r):.0f}",
        "lost": lambda r, alone: f"{1 - rate(r) / alone:.0%}",
        "paused": lambda r, _: f"{sum(sum(row['pauses_ms']) for row in r) / sum(row['wall_s'] for row in r) / 1e3:.1%}",
        "pause ms p50 / p95": lambda r, _: percentiles([pause for row in r for pause in row["pauses_ms"]]),
        "confirm ms p50 / p95": lambda r, _: percentiles([time_ms for row in r for time_ms in row["confirm_ms"]]),
        "recomputed / version": lambda r, _: (
            f"{sum(row['num_recomputed'] for row in r) / max(1, sum(row['num_swaps'] for row in r)):.0f}"
        ),
        "|gap| mean / max, lr 1e-3": lambda r, _: told_gap(r, 1e-3),
        "lr 1e-4": lambda r, _: told_gap(r, 1e-4),
    }
    for name in ("engine", "completions", "mode", *columns):
        table.add_column(name, justify="right")
    kinds = list(dict.fromkeys((row["launch"], row["shape"], row["mode"]) for row in rows))
    for launch, shape, mode in kinds:
        chosen = [row for row in rows if (row["launch"], row["shape"], row["mode"]) == (launch, shape, mode)]
        alone = [row for row in rows if (row["launch"], row["shape"], row["mode"]) == (launch, shape, "no swaps")]
        table.add_row(launch, shape, mode, *(cell(chosen, rate(alone)) for cell in columns.values()))
    console.print(table)


def rate(rows: list[Row]) -> float:
    return float(sum(row["num_tokens"] for row in rows) / sum(row["wall_s"] for row in rows))


def percentiles(values: list[float]) -> str:
    return f"{np.percentile(values, 50):.0f} / {np.percentile(values, 95):.0f}" if values else "-"


def told_gap(rows: list[Row], lr: float) -> str:
    rows = [row for row in rows if row["lr"] == lr and row["num_compared"]]
    if not rows:
        return "-"
    return f"{np.mean([row['gap_mean'] for row in rows]):.1e} / {max(row['gap_max'] for row in rows):.1e}"


if __name__ == "__main__":
    main()
