"""What the streams take of a step of the demo: commits and intake where groups come one by one, as often as in it.

Processor time of both, the intake's idle turns included, over the seconds of a step; how many groups a step decides
and how long it takes are from benchmarks/results/demo.json.
"""

import asyncio
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.compare.part import Part, Ratio
from benchmarks.compare.streams import SIZES, Learner, Row, groups_of
from benchmarks.demo import RESULTS
from benchmarks.durability import redis_server
from common.keys import Keys
from common.logs import logging_to
from common.redis_client import connect, connect_async
from common.wire import Group
from services.generation.tickets import Lease, TicketStore
from services.learner.intake import READ_COUNT

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
    with redis_server(folder, True) as url, logging_to(folder / "learner.log", "learner", run="streams"):
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
    per_group_s = [spent[0] / len(groups), intake_s / len(groups)]
    return {
        "groups_per_step": groups_per_step,
        "step_s": step_s,
        "commit_us_per_group": round(per_group_s[0] * 1e6, 1),
        "intake_us_per_group": round(per_group_s[1] * 1e6, 1),
        "share_of_step": sum(per_group_s) * groups_per_step / step_s,
    }


async def commit_paced(url: str, keys: Keys, groups: list[Group]) -> float:
    """At times as random as the demo's; seconds of processor time that the commits take."""
    client, rng = connect_async(url), random.Random(0)
    store = TicketStore(client, keys, "generation-0")
    await store.open()
    leases = await store.lease(keys.tickets, len(groups), 1.0)
    due_s = sorted(rng.uniform(0.0, PACED_S) for _ in leases)
    started, began = time.monotonic(), time.thread_time()

    async def commit(at_s: float, lease: Lease, group: Group) -> None:
        await asyncio.sleep(started + at_s - time.monotonic())
        assert await store.commit(lease, group)

    async with asyncio.TaskGroup() as commits:
        for one in zip(due_s, leases, groups, strict=True):
            commits.create_task(commit(*one))
    spent_s = time.thread_time() - began
    await client.aclose()
    return spent_s


def demo_pace() -> tuple[float, float]:
    """Groups decided in a step of the demo, and its seconds: medians over the runs of benchmarks.demo."""
    runs = json.loads((RESULTS / "demo.json").read_text())["rows"]
    decided = [sum(run["groups"].get(s, 0) for s in ("trained", "uniform", "stale")) / run["steps"] for run in runs]
    return statistics.median(decided), statistics.median(run["wall_s"] / run["steps"] for run in runs)
