"""Tokens per second of a replica and of its bare engine: one SGLang server serves both in turn.

The server is started as a replica starts it. Headrace's side is the replica's program: it leases tickets from a durable
Redis, calls the engine, scores with the task's reward in a separate process, and commits groups. It is timed from
issuing the tickets until the last group is in the stream. The bare side is an aiohttp client that sends the same
requests with the same concurrency, reads the responses and discards them, while no replica runs. Prompts, sampling and
log-probabilities are the recipe's.
"""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import redis

from benchmarks.compare.part import Part, Ratio
from benchmarks.cpu_time import cpu_seconds
from benchmarks.overhead.durability import redis_server
from headrace.common.config import LearnerConfig, RunConfig, load_recipe
from headrace.common.models.chat_template import ChatTemplate, stop_token_ids
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.process.run_token import TOKEN_VARIABLE
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.tasks import load_task
from headrace.common.wire import Ticket, decode_group, decode_heartbeat
from headrace.generation.engine.completions import generate_body
from headrace.generation.engine.server import EngineServer
from headrace.launcher.run.processes import REDIS_URL_VARIABLE, Service
from headrace.learner.intake.ticket_source import TicketSource
from headrace.learner.model.policy import Policy
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor
from headrace.learner.weights.publisher import WeightVersions

NUM_GROUPS, NUM_WARMING = 512, 64
GOAL = 0.97
DEADLINE_S = 600.0
POLL_S = 0.2
TOKEN = "benchmark"
Row = dict[str, Any]


def measure(recipe: str, repeats: int) -> Part:
    with tempfile.TemporaryDirectory(prefix="headrace-generation-") as folder:
        rows = asyncio.run(turns(recipe, Path(folder), repeats))
    rates = {side: [row["tokens_per_s"] for row in rows if row["side"] == side] for side in ("headrace", "bare")}
    ratios = [ours / bare for ours, bare in zip(rates["headrace"], rates["bare"], strict=True)]
    return Part(rows, [Ratio("tokens/s over the bare engine", ratios, GOAL)])


async def turns(recipe: str, folder: Path, repeats: int) -> list[Row]:
    config = load_recipe(recipe).config
    policy = Policy(config.model, LearnerConfig(device="cpu"))
    server = EngineServer(config.generation.engine, config.model.dtype, folder / "sglang.log")
    rows: list[Row] = []
    await server.start(config.model.location, None)
    try:
        replicas = load_recipe(recipe, [f"generation.engine.url={server.url}"]).config
        with redis_server(folder, True) as url:
            tickets = make_tickets(config, policy)
            await bare(server.url, config, tickets[:NUM_WARMING])
            for turn in range(repeats):
                ours = headrace(folder, url, replicas, tickets, policy, turn)
                pair = [bare(server.url, config, tickets), ours]
                rows += [await side for side in (pair if turn % 2 else pair[::-1])]
    finally:
        await server.stop()
    return rows


def make_tickets(config: RunConfig, policy: Policy) -> list[Ticket]:
    chat = ChatTemplate(load_tokenizer(config.model), config.model, config.task.system_prompt)
    task = load_task(config.task.name, config.task.settings)
    stops = stop_token_ids(chat, policy.model.generation_config)
    return TicketSource(config, task, chat, stops, Cursor(0, 0)).next_tickets(NUM_GROUPS, 0, 1)


async def bare(url: str, config: RunConfig, tickets: list[Ticket]) -> Row:
    waiting, num_tokens = iter(tickets), 0

    async def work(http: aiohttp.ClientSession) -> None:
        nonlocal num_tokens
        for ticket in waiting:
            body = generate_body(ticket, [f"{ticket.id}-{index}." for index in range(ticket.num_completions)])
            async with http.post("/generate", json=body) as response:
                samples = await response.json()
            num_tokens += sum(len(sample["output_ids"]) for sample in samples)

    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(url, timeout=timeout, raise_for_status=True) as http:
        started, spent_s = time.time(), time.process_time()
        async with asyncio.TaskGroup() as workers:
            for _ in range(config.generation.max_groups_in_flight):
                workers.create_task(work(http))
        return as_row("bare", len(tickets), num_tokens, time.time() - started, time.process_time() - spent_s)


async def headrace(folder: Path, url: str, config: RunConfig, tickets: list[Ticket], policy: Policy, turn: int) -> Row:
    """A run of its own; the replica has swapped to its first version before the timing starts."""
    client, keys = connect(url), Keys(f"generation-{turn}")
    store = LearnerStore(client, keys)
    client.set(keys.config, config.model_dump_json(exclude={"redis_url"}))
    versions = WeightVersions(folder / f"weights-{turn}", store, "http://127.0.0.1:1", TOKEN)
    versions.publish(versions.snapshot(policy.published_weights()), 0, versions.reserve())
    with replica_of(folder, url, keys) as service:
        await until(lambda: is_running(client, keys))
        started, spent_s = time.time(), cpu_seconds(service)
        store.add_tickets(keys.tickets, tickets)
        await until(lambda: client.xlen(keys.groups) == len(tickets))
        spent_s = cpu_seconds(service) - spent_s
    versions.close()
    entries: Any = client.xrange(keys.groups)
    ended = int(entries[-1][0].partition(b"-")[0]) / 1e3
    num_tokens = sum(decode_group(fields[b"group"]).num_trained_tokens for _, fields in entries)
    return as_row("headrace", len(entries), num_tokens, ended - started, spent_s)


@contextmanager
def replica_of(folder: Path, url: str, keys: Keys) -> Iterator[Service]:
    command = [sys.executable, "-m", "headrace.generation", "--run", keys.run, "--name", "generation-0"]
    environment = {REDIS_URL_VARIABLE: url, TOKEN_VARIABLE: TOKEN}
    log = folder / f"{keys.run}.log"
    service = Service("generation-0", [*command, "--log-folder", str(folder)], log, environment)
    try:
        yield service
    except TimeoutError as error:
        raise RuntimeError(service.log_tail()) from error
    finally:
        service.stop(15.0)


def is_running(client: redis.Redis, keys: Keys) -> bool:
    payload: Any = client.get(keys.replica("generation-0"))
    return payload is not None and decode_heartbeat(payload).state == "running"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(POLL_S)


def as_row(side: str, num_groups: int, num_tokens: int, seconds: float, client_s: float) -> Row:
    """`client_s`: processor time of the replica or of the bare client."""
    rates = {"tokens_per_s": num_tokens / seconds, "groups_per_s": num_groups / seconds}
    spent = {"client_ms_per_group": client_s / num_groups * 1e3, "load_average": os.getloadavg()[0]}
    return {"side": side, "num_tokens": num_tokens, "seconds": seconds} | rates | spent
