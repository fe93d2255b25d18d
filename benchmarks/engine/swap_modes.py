"""The cost of a weight swap for requests in flight, by swap mode.

    python -m benchmarks.engine.swap_modes [--repeats 2]

Both modes take turns on one engine that supports both (no overlap schedule, no radix cache), beside the same work
without swaps. The workloads are groups of the demo's policy, of the demo's length (about 14 tokens, up to the end
token) and of 512 tokens (the end token is ignored), with a new version every one or two seconds of the engine's
processor time. A version moves each weight by a normal step of `lr`, about as much as one AdamW update. Reported are:
tokens per second of the engine's processor time, which other work on the machine does not change, and the share lost to
swaps; tokens prefilled beyond the prompts, per version, by the engine's own count; the pause; and the gap between the
behaviour log-probabilities of tokens after a swap and an exact forward pass under the version that they are labelled
with. Rows go to benchmarks/results/swap_modes.json.

The default stays `retract`: it costs engine time (21 % in the demo with a version every second, 7 % with 512 tokens and
a version every two seconds), but is exact and needs no special engine settings. Whole runs of the demo
(`benchmarks.demo --vary`) take 4 % more time with it, and 10 % more of the engine's (they keep the overlap schedule).
With `in_place` they learn as well, but engine and learner differ by up to 0.4 on fresh tokens, and this gap otherwise
shows whether an engine computes correctly. The engine features that `in_place` rules out matter on a GPU; this was not
measured.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from benchmarks.demo import ROOT, this_machine
from benchmarks.engine.logprob_gap import Prompted, gaps
from benchmarks.engine.swap_table import Row, report
from headrace.common.config import EngineConfig, ModelConfig
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.tasks.arithmetic import Arithmetic
from headrace.common.wire import Sampling, Ticket
from headrace.generation.engine.client import Engine, SwapTimings
from headrace.generation.engine.completions import Completion, Sample, generate_body, to_completion
from headrace.generation.engine.server import EngineServer
from headrace.generation.engine.swaps.checks import SwapMode

POLICY = ROOT / "headrace" / "demo" / "policy"
RESULTS = ROOT / "benchmarks" / "results" / "swap_modes.json"
LRS = (1e-3, 1e-4)
NUM_STEPS = 8
"""Number of versions of a random walk, which is walked back and forth."""
GROUP_SIZE = 8
POLL_S = 0.05


@dataclass(frozen=True)
class Shape:
    """`num_groups` groups with `num_in_flight` at a time; `ends`: completions end at the end token, not only at
    `max_new_tokens`."""

    name: str
    num_groups: int
    num_in_flight: int
    max_new_tokens: int
    ends: bool
    interval_s: float
    """Processor time of the engine between versions: the demo's step, or a few versions within one long completion."""


SHAPES = [Shape("demo, ~14 tokens", 60, 16, 40, True, 1.0), Shape("512 tokens", 2, 2, 512, False, 2.0)]
Turn = tuple[float, Shape, SwapMode | None]
MODES: tuple[SwapMode | None, ...] = (None, "retract", "in_place")


@dataclass
class Walk:
    """The folder of weights that each version of one engine was loaded from."""

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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.swap_modes")
    parser.add_argument("--repeats", type=int, default=2, help="number of turns of each kind and learning rate")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the groups to run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-swap-modes-") as folder:
        for lr in LRS:
            write_walk(Path(folder), lr)
        turns: list[Turn] = [(lr, shape, mode) for lr in LRS * arguments.repeats for shape in SHAPES for mode in MODES]
        rows = asyncio.run(measure(turns, Path(folder), arguments.scale))
    machine = this_machine()
    load = {"load_average": os.getloadavg()}
    RESULTS.write_text(json.dumps({"machine": machine | load, "rows": rows}, indent=1) + "\n")
    report(rows, Console(highlight=False, width=170))


def write_walk(root: Path, lr: float) -> None:
    """Writes the folders of `NUM_STEPS` versions, each a normal step of `lr` away from the one before."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(POLICY / "model.safetensors")
    for step in range(NUM_STEPS):
        folder = root / f"{lr:g}-{step}"
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        weights = {name: w + lr * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


async def measure(turns: list[Turn], root: Path, scale: float) -> list[Row]:
    """Takes the turns one after another on one server; the first runs twice, to warm the server up."""
    server = EngineServer(EngineConfig(device="cpu", swap_mode="in_place"), "float32", root / "sglang.log")
    await server.start(POLICY, 1)
    walk, rows = Walk(root), []
    try:
        for place, (lr, shape, mode) in enumerate([turns[0], *turns]):
            engine = Engine(server.url, swap_mode=mode or "retract")
            tickets = list(make_tickets(shape, max(1, round(shape.num_groups * scale))))
            row, completions = await take_turn(server, engine, walk, tickets, (lr, shape, mode))
            await engine.aclose()
            if place > 0:
                rows.append(row | gaps(completions, walk.folders, POLICY))
                print(json.dumps(rows[-1]), flush=True)
    finally:
        await server.stop()
    return rows


async def take_turn(
    server: EngineServer, engine: Engine, walk: Walk, tickets: list[Ticket], turn: Turn
) -> tuple[Row, Prompted]:
    lr, shape, mode = turn
    await engine.swap(*walk.next(lr))
    num_prefilled, started_s, busy_before_s = await prefilled_tokens(engine), time.monotonic(), busy_s(server)
    ended = asyncio.Event()
    swapping = asyncio.create_task(keep_swapping(server, engine, walk, lr, shape.interval_s if mode else None, ended))
    slots = asyncio.Semaphore(shape.num_in_flight)
    groups = await asyncio.gather(*(answer(engine, ticket, shape, slots) for ticket in tickets))
    wall_s, engine_s = time.monotonic() - started_s, busy_s(server) - busy_before_s
    ended.set()
    timings = await swapping
    num_recomputed = await prefilled_tokens(engine) - num_prefilled
    num_recomputed -= sum(len(ticket.prompt_tokens) for ticket in tickets) * GROUP_SIZE
    completions = [(t.prompt_tokens, c) for t, group in zip(tickets, groups, strict=True) for c in group]
    num_tokens = sum(len(completion.tokens) for _, completion in completions)
    row = {"shape": shape.name, "mode": mode or "no swaps", "lr": lr, "num_tokens": num_tokens, "wall_s": wall_s}
    row |= {"engine_s": engine_s, "num_swaps": len(timings), "num_recomputed": num_recomputed}
    row |= {"pauses_ms": [timing.pause_s * 1e3 for timing in timings]}
    row |= {"confirm_ms": [timing.confirm_s * 1e3 for timing in timings]}
    return row, completions


def make_tickets(shape: Shape, count: int) -> Iterator[Ticket]:
    tokenizer = load_tokenizer(ModelConfig(path=str(POLICY)))
    prompts = Arithmetic().prompts("train", seed=0, epoch=0)
    sampling = Sampling(1.0, shape.max_new_tokens, [tokenizer.eos_token_id] if shape.ends else [])
    for place, prompt in zip(range(count), prompts, strict=False):
        text = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        yield Ticket(f"0-{place}", "train", tokens, [], {}, GROUP_SIZE, sampling, 0)


async def answer(engine: Engine, ticket: Ticket, shape: Shape, slots: asyncio.Semaphore) -> list[Completion]:
    """Like `Engine.generate`, but can ignore the end token."""
    request = uuid.uuid4().hex
    body = generate_body(ticket, [f"{request}-{index}." for index in range(GROUP_SIZE)])
    body["sampling_params"]["ignore_eos"] = not shape.ends
    async with slots:
        samples = await engine.generate_unchecked(body, list[Sample])
    return [to_completion(sample) for sample in samples]


async def keep_swapping(
    server: EngineServer, engine: Engine, walk: Walk, lr: float, interval_s: float | None, ended: asyncio.Event
) -> list[SwapTimings]:
    """Swaps after every `interval_s` of the engine's processor time, at most as often as a replica would, until
    `ended`."""
    timings: list[SwapTimings] = []
    last_s = busy_s(server)
    while not ended.is_set():
        await asyncio.sleep(POLL_S)
        if interval_s is not None and busy_s(server) - last_s >= interval_s:
            last_s = busy_s(server)
            timings.append(await engine.swap(*walk.next(lr)))
            await engine.wait_for_progress(timings[-1])
    return timings


def busy_s(server: EngineServer) -> float:
    seconds = server.busy_s()
    assert seconds is not None, "the engine is on a CPU"
    return seconds


async def prefilled_tokens(engine: Engine) -> int:
    """The number of tokens that the engine has prefilled since its start, by its own count."""
    async with httpx.AsyncClient(base_url=engine.url, trust_env=False) as http:
        return int((await http.get("/v1/loads")).json()["loads"][0]["total_prefill_uncached_tokens"])


if __name__ == "__main__":
    main()
