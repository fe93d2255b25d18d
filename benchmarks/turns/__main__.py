"""What turns cost: tokens per second and seconds per group, by the number of turns, with and without a prefix cache.

    python -m benchmarks.turns [--repeats 3]

The gateway, with a real environment worker that asks for replies, and a bare engine, which is sent the same tokens by
`/generate`, take turns on one engine; every reply has 64 tokens. A second engine has no prefix cache. Last, one worker
holds 1,000 episodes that wait. Rows go to benchmarks/results/turns.json.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from benchmarks.demo import ROOT, this_machine
from benchmarks.turns.policy import NUM_TURN_TOKENS, Talk, make_bridge, make_talk, make_ticket, write_policy
from headrace.common.config import EngineConfig, TaskConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.wire import Rollout, Sampling
from headrace.generation.engine.client import Engine
from headrace.generation.engine.completions import TurnRequest, turn_body
from headrace.generation.engine.server import EngineServer
from headrace.generation.environments.episodes import Episodes
from headrace.generation.environments.messages import EpisodeStart
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.gateway.server import Gateway

RESULTS = ROOT / "benchmarks" / "results" / "turns.json"
TURNS = (1, 4, 16)
GROUP_SIZE, NUM_GROUPS = 8, 4
NUM_SLEEPING, SLEEP_S, SETTLE_S = 1000, 40.0, 5.0
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns")
    parser.add_argument("--repeats", type=int, default=3, help="number of measurements of each kind")
    repeats: int = parser.parse_args().repeats
    load = {"load_average": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="headrace-turns-") as folder:
        policy = write_policy(Path(folder) / "policy")
        rows = [row for has_cache in (True, False) for row in asyncio.run(measure(policy, has_cache, repeats))]
    sleeping = asyncio.run(measure_sleeping())
    found = {"machine": this_machine() | load, "rows": rows, "sleeping": sleeping}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    report(rows, sleeping, Console(highlight=False, width=120))


async def measure(policy: Path, has_cache: bool, repeats: int) -> list[Row]:
    """Rows of one engine: of each number of turns and each way to ask, the median of the repeats."""
    bridge = make_bridge(policy)
    talk, rows = make_talk(bridge), list[Row]()
    server = EngineServer(EngineConfig(device="cpu", prefix_cache=has_cache), "float32", policy.parent / "sglang.log")
    await server.start(policy, 1)
    engine = Engine(server.url)
    settings = EnvironmentConfig(episodes_per_worker=GROUP_SIZE * NUM_GROUPS)
    gateway = Gateway(engine, bridge, settings, "policy")
    pool = EnvironmentPool(TaskConfig(name="benchmarks.tasks.talking:Talking"), settings)
    try:
        await pool.start()
        async with gateway.serve(), aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            episodes = Episodes(pool, gateway.open_episode, engine.wait_until_confirmed, settings)

            async def by_gateway(num_turns: int) -> Row:
                return await groups(episodes, talk, num_turns)

            async def by_engine(num_turns: int) -> Row:
                return await bare_groups(http, server.url, talk, num_turns)

            await asyncio.gather(by_gateway(2), by_engine(2))  # warms up
            for num_turns in TURNS:
                found: dict[str, list[Row]] = {"gateway": [], "bare": []}
                for _ in range(repeats):
                    for name, ask in (("bare", by_engine), ("gateway", by_gateway)):
                        found[name].append(await timed(server, ask(num_turns)))
                for name, several in found.items():
                    rows.append(row_of(name, has_cache, num_turns, several))
                    print(json.dumps(rows[-1]), flush=True)
    finally:
        await pool.close()
        await engine.aclose()
        await server.stop()
    return rows


async def timed(server: EngineServer, asked: Coroutine[Any, Any, Row]) -> Row:
    started_s, busy_s = time.monotonic(), server.busy_s() or 0.0
    row = await asked
    return {"wall_s": time.monotonic() - started_s, "engine_s": (server.busy_s() or 0.0) - busy_s, **row}


async def groups(episodes: Episodes, talk: Talk, num_turns: int) -> Row:
    """`NUM_GROUPS` groups of episodes through the gateway."""
    tickets = [make_ticket(talk, f"0-{uuid.uuid4().int % 10**9}", num_turns, GROUP_SIZE) for _ in range(NUM_GROUPS)]
    found = await asyncio.gather(*(episodes.run(ticket) for ticket in tickets))
    rollouts = [rollout for group in found for rollout in group.rollouts]
    assert all(len(rollout.segments) == 1 for rollout in rollouts)
    replies = [turn for rollout in rollouts for turn in rollout.turns if turn.role == "assistant"]
    context = sum(len(talk.prompt_tokens) + turn.start for turn in replies)
    return {"num_tokens": num_tokens(rollouts), "cached": sum(turn.cached_tokens for turn in replies) / context}


def num_tokens(rollouts: list[Rollout]) -> int:
    return sum(rollout.num_trained_tokens for rollout in rollouts)


async def bare_groups(http: aiohttp.ClientSession, url: str, talk: Talk, num_turns: int) -> Row:
    """As many conversations with the engine alone: the tokens go back as they came."""
    found = await asyncio.gather(*(bare(http, url, talk, num_turns) for _ in range(GROUP_SIZE * NUM_GROUPS)))
    return {
        "num_tokens": sum(n for n, _, _ in found),
        "cached": sum(c for _, c, _ in found) / sum(t for *_, t in found),
    }


async def bare(http: aiohttp.ClientSession, url: str, talk: Talk, num_turns: int) -> tuple[int, int, int]:
    """Returns the numbers of sampled tokens, and of tokens of contexts that were cached, and were sent."""
    tokens, sampled, cached, sent = list(talk.prompt_tokens), 0, 0, 0
    for turn in range(num_turns):
        tokens += talk.bridge_tokens if turn else []
        body = turn_body(TurnRequest(tokens, Sampling(1.0, NUM_TURN_TOKENS, []), uuid.uuid4().hex))
        async with http.post(f"{url}/generate", json=body) as response:
            reply = await response.json()
        sent += len(tokens)
        cached += reply["meta_info"]["cached_tokens"]
        sampled += len(reply["output_ids"])
        tokens += reply["output_ids"]
    return sampled, cached, sent


def row_of(way: str, has_cache: bool, num_turns: int, several: list[Row]) -> Row:
    wall_s, engine_s = (statistics.median(one[name] for one in several) for name in ("wall_s", "engine_s"))
    sampled, cached = (statistics.median(one[name] for one in several) for name in ("num_tokens", "cached"))
    return {
        "way": way,
        "prefix_cache": has_cache,
        "turns": num_turns,
        "tokens_per_s": sampled / wall_s,
        "s_per_group": wall_s / NUM_GROUPS,
        "engine_s_per_group": engine_s / NUM_GROUPS,
        "cached_share": cached,
        "walls_s": [one["wall_s"] for one in several],
    }


async def measure_sleeping() -> Row:
    """Processor time and memory of one worker that holds `NUM_SLEEPING` episodes, after `SETTLE_S`."""
    settings = EnvironmentConfig(episodes_per_worker=NUM_SLEEPING)
    pool = EnvironmentPool(TaskConfig(name="benchmarks.tasks.talking:Sleeping"), settings)
    await pool.start()
    (process,) = psutil.Process().children()
    try:
        ticket = replace(make_ticket(Talk([1], []), "0-0", 1, 1), reference={"seconds": SLEEP_S})
        starts = [
            EpisodeStart(ticket, place, 0, place, "http://127.0.0.1:9/v1", "-", "-") for place in range(NUM_SLEEPING)
        ]
        playing = [asyncio.create_task(pool.run(start, lambda: 0.0)) for start in starts]
        await asyncio.sleep(SETTLE_S)
        assert pool.num_playing == NUM_SLEEPING
        own_s, times, began_s = time.process_time(), process.cpu_times(), time.monotonic()
        await asyncio.sleep(SLEEP_S - 2 * SETTLE_S)
        wall_s, after = time.monotonic() - began_s, process.cpu_times()
        row = {
            "episodes": NUM_SLEEPING,
            "worker_core_share": max(0.0, (after.user + after.system - times.user - times.system) / wall_s),
            "replica_core_share": (time.process_time() - own_s) / wall_s,
            "worker_rss_bytes": process.memory_info().rss,
        }
        await asyncio.gather(*playing)
        return row
    finally:
        await pool.close()


def report(rows: list[Row], sleeping: Row, console: Console) -> None:
    table = Table(title=f"Replies of {NUM_TURN_TOKENS} tokens, {NUM_GROUPS} groups of {GROUP_SIZE} at a time")
    for name in (
        "turns",
        "prefix cache",
        "gateway tokens/s",
        "bare tokens/s",
        "ratio",
        "s/group",
        "engine s/group",
        "cached",
    ):
        table.add_column(name, justify="right")
    for one in (row for row in rows if row["way"] == "gateway"):
        same = [one["turns"], one["prefix_cache"]]
        (other,) = [row for row in rows if row["way"] == "bare" and [row["turns"], row["prefix_cache"]] == same]
        table.add_row(
            str(one["turns"]),
            "on" if one["prefix_cache"] else "off",
            f"{one['tokens_per_s']:.0f}",
            f"{other['tokens_per_s']:.0f}",
            f"{one['tokens_per_s'] / other['tokens_per_s']:.3f}",
            f"{one['s_per_group']:.2f}",
            f"{one['engine_s_per_group']:.2f}",
            f"{one['cached_share']:.0%}",
        )
    console.print(table)
    console.print(
        f"{sleeping['episodes']} sleeping episodes in one worker: {sleeping['worker_core_share']:.1%} of a core in the "
        f"worker, {sleeping['replica_core_share']:.1%} in the replica, {sleeping['worker_rss_bytes'] / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
