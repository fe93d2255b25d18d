"""The share of a step of the demo that the streams take: commits and intake of groups that arrive at the demo's pace.

It is the processor time of both, the intake's idle polls included, divided by the seconds of a step. The number of
groups settled per step and the step's duration come from benchmarks/results/demo.json. For comparison it measures one
XADD of the same bytes at the same times: at this pace a round trip costs more than the work done in it.
"""

import asyncio
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import redis.asyncio

from benchmarks.compare.part import Part, Ratio
from benchmarks.compare.streams import SIZES, Learner, Row, groups_of
from benchmarks.demo import RESULTS
from benchmarks.overhead.durability import redis_server
from headrace.common.process.logs import log_to_file
from headrace.common.redis.client import connect, connect_async
from headrace.common.redis.keys import Keys
from headrace.common.wire import Group, encode
from headrace.generation.tickets.store import TicketStore
from headrace.learner.intake.intake import READ_COUNT

SIZE = SIZES[0]
PACED_S = 20.0


def measure(repeats: int) -> Part:
    with tempfile.TemporaryDirectory(prefix="headrace-paced-") as folder:
        rows = [share_of_a_step(Path(folder) / str(turn)) for turn in range(repeats)]
    shares = [row["share_of_step"] for row in rows]
    return Part(rows, [Ratio("share of a step of the demo", shares, 0.01, is_ceiling=True)])


def share_of_a_step(folder: Path) -> Row:
    groups_per_step, step_s = demo_pace()
    groups = groups_of(SIZE._replace(num_groups=int(PACED_S * groups_per_step / step_s)))
    with redis_server(folder, True) as url, log_to_file(folder / "learner.log", "learner", run="streams"):
        keys = Keys("streams")
        learner = Learner(connect(url), keys, SIZE)
        learner.store.add_tickets(keys.tickets, [group.ticket for group in groups])
        spent: list[float] = []
        replica = threading.Thread(target=lambda: spent.append(asyncio.run(commit_paced(url, keys, groups))))
        began = time.thread_time()
        replica.start()
        while replica.is_alive() or learner.num_trained + READ_COUNT < len(groups):
            learner.turn()
        for _ in range(2):
            learner.settle()
        intake_s = time.thread_time() - began
        replica.join()
        bare_s = asyncio.run(add_paced(url, groups))
    per_group_s = [spent[0] / len(groups), intake_s / len(groups)]
    return {
        "groups_per_step": groups_per_step,
        "step_s": step_s,
        "commit_us_per_group": round(per_group_s[0] * 1e6, 1),
        "intake_us_per_group": round(per_group_s[1] * 1e6, 1),
        "bare_xadd_us_per_group": round(bare_s / len(groups) * 1e6, 1),
        "share_of_step": sum(per_group_s) * groups_per_step / step_s,
    }


async def commit_paced(url: str, keys: Keys, groups: list[Group]) -> float:
    """Processor seconds of the commits."""
    client = connect_async(url)
    store = TicketStore(client, keys, "generation-0")
    await store.open()
    leases = {lease.ticket.id: lease for lease in await store.lease(keys.tickets, len(groups), 1.0)}

    async def commit(group: Group) -> None:
        assert await store.commit(leases[group.ticket.id], group)

    spent_s = await paced(groups, commit)
    await client.aclose()
    return spent_s


async def add_paced(url: str, groups: list[Group]) -> float:
    """Processor seconds of one XADD per group, of bytes that are already encoded."""
    client, payloads = redis.asyncio.Redis.from_url(url), {group.ticket.id: encode(group) for group in groups}

    async def add(group: Group) -> None:
        await client.xadd("bare", {"id": group.ticket.id, "group": payloads[group.ticket.id]})

    spent_s = await paced(groups, add)
    await client.aclose()
    return spent_s


async def paced(groups: list[Group], send: Callable[[Group], Awaitable[None]]) -> float:
    """Calls `send` at times as random as the demo's; returns this thread's processor seconds."""
    rng = random.Random(0)
    due_s = sorted(rng.uniform(0.0, PACED_S) for _ in groups)
    started, began = time.monotonic(), time.thread_time()

    async def send_at(at_s: float, group: Group) -> None:
        await asyncio.sleep(started + at_s - time.monotonic())
        await send(group)

    async with asyncio.TaskGroup() as sent:
        for one in zip(due_s, groups, strict=True):
            sent.create_task(send_at(*one))
    return time.thread_time() - began


def demo_pace() -> tuple[float, float]:
    """The number of groups settled in a step of the demo, and its seconds: medians over the runs of benchmarks.demo."""
    runs = json.loads((RESULTS / "demo.json").read_text())["rows"]
    decided = [sum(run["groups"].get(s, 0) for s in ("trained", "uniform", "stale")) / run["steps"] for run in runs]
    return statistics.median(decided), statistics.median(run["wall_s"] / run["steps"] for run in runs)
