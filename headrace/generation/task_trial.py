"""Tries what a task computes, in a worker like a replica's, before a run: its reward of an empty completion of each
ticket, or an episode of each ticket whose replies are empty.

    python -m headrace.generation.task_trial OUTPUT < config.json, a newline, the encoded tickets in msgpack

Writes the first problem to OUTPUT, or an empty file. `headrace check` and `headrace up` start it. A model may always
reply with nothing, so neither may fail then.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from headrace.common.config import RunConfig
from headrace.common.wire import Ticket, decode_ticket
from headrace.generation.environments.trial import play_empty_episodes
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.workers.process import WorkerError


def main() -> int:
    problem = asyncio.run(try_task(RunConfig.model_validate_json(sys.stdin.buffer.readline()), _tickets))
    Path(sys.argv[1]).write_text(problem)
    return 0


def _tickets() -> list[Ticket]:
    payloads = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=list[bytes])
    return [decode_ticket(payload) for payload in payloads if payload]


async def try_task(config: RunConfig, read_tickets: Callable[[], list[Ticket]]) -> str:
    """The first problem; empty if there is none. A worker starts before the tickets are read."""
    settings = config.generation
    pool = RewardPool(
        config.task.name,
        config.task.settings,
        num_workers=1,
        deadline_s=settings.reward_deadline_s,
        memory_bytes=settings.reward_memory_bytes,
    )
    try:
        if not await pool.start():
            problem = await play_empty_episodes(config, read_tickets)
            return problem and f"its episode with empty replies: {problem}"
        for ticket in read_tickets():
            await pool.score(ticket, [""])
    except WorkerError as error:
        return f"its reward of an empty completion: {error}"
    finally:
        await pool.close()
    return ""


if __name__ == "__main__":
    sys.exit(main())
