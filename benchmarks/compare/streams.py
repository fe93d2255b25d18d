"""Groups through Headrace's streams, against raw pipelined XADD, XREADGROUP, XACK and XDEL of the same bytes.

There is one server, as durable as a run's, and one client process; both sides use them in turn. Headrace's side is a
replica's commits, with the demo's number of groups in flight, then the learner's intake with its validation, batches,
and the settling of checkpoints (without writing their files), including its log. The raw side uses as few round trips
as possible: the same number of XADDs in a pipeline, XREADGROUP of as many entries as the intake reads, and their XACK
and XDEL in one pipeline.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis

from benchmarks.compare.part import Part, Ratio
from benchmarks.demo import RECIPE
from benchmarks.overhead.durability import random_group, redis_server
from headrace.common.config import RunConfig, load_recipe
from headrace.common.process.logs import log_to_file
from headrace.common.redis.client import connect, connect_async
from headrace.common.redis.keys import Keys
from headrace.common.wire import Group, Ticket, decode_group, encode
from headrace.generation.tickets.store import TicketStore
from headrace.learner.intake.group_source import IssueResult
from headrace.learner.intake.intake import READ_COUNT, Intake
from headrace.learner.intake.validation import GroupLimits
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor


class Size(NamedTuple):
    name: str
    num_rollouts: int
    num_tokens: int
    """Number of tokens of each rollout."""
    num_groups: int


SIZES = (Size("8 x 16 tokens", 8, 16, 2048), Size("16 x 1,000 tokens", 16, 1000, 128))
Row = dict[str, Any]


class NoTickets:
    """A source that issues nothing: the tickets exist before the timing starts."""

    cursor, data, is_recording, is_exhausted = Cursor(0, 0), None, False, False

    def issue(self, *_: object) -> IssueResult:
        return IssueResult([])

    def ids_to_issue(self) -> list[str]:
        return []

    def configure(self, config: RunConfig) -> None: ...
    def replace_stale(self, ticket: Ticket) -> None: ...
    def issue_again(self, ticket_ids: Sequence[str]) -> None: ...
    def rebuild(self, ticket_ids: Sequence[str], step: int, version: int) -> list[Ticket]:
        return []

    def evaluation_tickets(self, step: int, version: int) -> list[Ticket]:
        return []


class Learner:
    """Intake and settling as in the loop, without steps."""

    def __init__(self, client: redis.Redis, keys: Keys, size: Size) -> None:
        self.config = load_recipe(RECIPE, [f"actor.group_size={size.num_rollouts}"]).config
        self.store = LearnerStore(client, keys)
        limits = GroupLimits(512, size.num_rollouts, 2, 2048, 1)
        self.intake = Intake(self.config, self.store, NoTickets(), {1: 0}, lambda: limits, [], Switches())
        self.intake.on_announced(1)
        self.num_steps = self.num_trained = 0

    def turn(self) -> None:
        self.intake.poll_once()
        self.train()

    def train(self) -> None:
        """Consumes all complete batches."""
        while batch := self.intake.take_batch(0.0, lambda: True):
            self.intake.mark_trained(batch)
            self.intake.on_announced(1, len(batch))
            self.num_trained += len(batch)
            self.num_steps += 1
            if self.num_steps % self.config.learner.checkpoint_interval_steps == 0:
                self.settle()

    def settle(self) -> None:
        self.intake.on_checkpointed(self.intake.checkpoint_delta())


def measure(repeats: int) -> Part:
    rows: list[Row] = []
    ratios = []
    with tempfile.TemporaryDirectory(prefix="headrace-streams-") as folder:
        for size in SIZES:
            found = [both(Path(folder) / f"{size.num_tokens}-{turn}", size, turn) for turn in range(repeats)]
            rows += [row for pair in found for row in pair]
            rates = [[row["groups_per_s"] for row in pair] for pair in found]
            ratios.append(Ratio(f"{size.name}: groups/s over raw", [ours / raw for ours, raw in rates], 0.8))
    return Part(rows, ratios)


def both(folder: Path, size: Size, turn: int) -> tuple[Row, Row]:
    """Headrace's row and the raw one, measured in alternating order."""
    groups = groups_of(size)
    with redis_server(folder, True) as url, log_to_file(folder / "learner.log", "learner", run="streams"):
        sides = {"headrace": headrace, "raw": raw}
        names = list(sides) if turn % 2 else list(sides)[::-1]
        found = {name: sides[name](url, size, groups) for name in names}
    return found["headrace"], found["raw"]


def groups_of(size: Size) -> list[Group]:
    rng = random.Random(size.num_tokens)
    return [random_group(rng, place, size.num_rollouts, size.num_tokens) for place in range(size.num_groups)]


def headrace(url: str, size: Size, groups: list[Group]) -> Row:
    client, keys = connect(url), Keys("streams")
    learner = Learner(client, keys, size)
    learner.store.add_tickets(keys.tickets, [group.ticket for group in groups])
    with counted(client) as counts:
        published_s = asyncio.run(commit_all(url, keys, groups, learner.config.generation.max_groups_in_flight))
        started = time.perf_counter()
        while learner.num_trained < size.num_groups:
            learner.turn()
        consumed = time.perf_counter()
        for _ in range(2):  # a group leaves Redis one checkpoint after the one that recorded it
            learner.settle()
        settled_s = time.perf_counter() - consumed
    assert client.xlen(keys.groups) == 0
    assert client.hget(keys.ledger, groups[-1].ticket.id) == b"trained"
    row = as_row("headrace", size, groups, [published_s, consumed - started, settled_s], counts)
    return row | {"decode_us_per_group": round(decoding_s(groups) / len(groups) * 1e6, 1)}


def decoding_s(groups: list[Group]) -> float:
    """Seconds to decode and validate the groups, which the raw side does not do."""
    payloads = [encode(group) for group in groups]
    started = time.perf_counter()
    for payload in payloads:
        decode_group(payload)
    return time.perf_counter() - started


async def commit_all(url: str, keys: Keys, groups: list[Group], at_once: int) -> float:
    """Seconds of the commits; the leases were taken before."""
    client = connect_async(url)
    store = TicketStore(client, keys, "generation-0")
    await store.open()
    leases = await store.lease(keys.tickets, len(groups), 1.0)
    answered = iter(zip(leases, groups, strict=True))

    async def work() -> None:
        for lease, group in answered:
            assert await store.commit(lease, group)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as workers:
        for _ in range(at_once):
            workers.create_task(work())
    published_s = time.perf_counter() - started
    await client.aclose()
    return published_s


def raw(url: str, size: Size, groups: list[Group]) -> Row:
    client, stream = redis.Redis.from_url(url), "raw"
    client.xgroup_create(stream, "readers", id="0", mkstream=True)
    at_once = load_recipe(RECIPE, []).config.generation.max_groups_in_flight
    payloads = [(group.ticket.id, encode(group)) for group in groups]
    with counted(client) as counts:
        times = [time.perf_counter()]
        for first in range(0, len(payloads), at_once):
            with client.pipeline(transaction=False) as pipe:
                for name, payload in payloads[first : first + at_once]:
                    pipe.xadd(stream, {"id": name, "group": payload})
                pipe.execute()
        times.append(time.perf_counter())
        while found := client.xreadgroup("readers", "reader", {stream: ">"}, count=READ_COUNT):
            rows = found[stream.encode()][0] if isinstance(found, dict) else found[0][1]
            names = [name for name, _ in rows]
            with client.pipeline(transaction=False) as pipe:
                pipe.xack(stream, "readers", *names).xdel(stream, *names).execute()
        times.append(time.perf_counter())
    assert client.xlen(stream) == 0
    return as_row("raw", size, groups, [times[1] - times[0], times[2] - times[1]], counts)


@contextmanager
def counted(client: redis.Redis) -> Iterator[dict[str, float]]:
    """The server's counters for the block: commands, and bytes in and out."""
    names = ("total_commands_processed", "total_net_input_bytes", "total_net_output_bytes")
    found: dict[str, float] = {}
    before: Any = client.info("stats")
    yield found
    after: Any = client.info("stats")
    found.update({name: float(after[name] - before[name]) for name in names})


def as_row(side: str, size: Size, groups: list[Group], seconds: list[float], counts: dict[str, float]) -> Row:
    """`seconds`: of publishing, of consuming, and of the acknowledgements that follow."""
    num_bytes = sum(len(encode(group)) for group in groups)
    return {
        "side": side,
        "size": size.name,
        "groups_per_s": len(groups) / sum(seconds),
        "mib_per_s": num_bytes / sum(seconds) / 2**20,
        "us_per_group": [round(part / len(groups) * 1e6, 1) for part in seconds],
        "payload_bytes": num_bytes / len(groups),
        **{f"{name.removeprefix('total_')}_per_group": count / len(groups) for name, count in counts.items()},
    }
