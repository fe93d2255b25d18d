"""Scores an empty completion of each ticket in a reward worker like a replica's, to test the task's reward.

    python -m headrace.generation.rewards.trial OUTPUT < config.json, a newline, the encoded tickets in msgpack

Writes the first problem to OUTPUT, or an empty file. `headrace check` and `headrace up` start it.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from headrace.common.config import RunConfig
from headrace.common.wire import decode_ticket
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.workers.process import WorkerError


def main() -> int:
    problem = asyncio.run(score_empty_completions(RunConfig.model_validate_json(sys.stdin.buffer.readline()), _tickets))
    Path(sys.argv[1]).write_text(problem)
    return 0


def _tickets() -> list[bytes]:
    return msgspec.msgpack.decode(sys.stdin.buffer.read(), type=list[bytes])


async def score_empty_completions(config: RunConfig, read_tickets: Callable[[], list[bytes]]) -> str:
    """The reason why a completion could not be scored; empty if all were. The worker starts before the tickets are
    read."""
    settings = config.generation
    pool = RewardPool(
        config.task.name,
        config.task.settings,
        num_workers=1,
        deadline_s=settings.reward_deadline_s,
        memory_bytes=settings.reward_memory_bytes,
    )
    try:
        await pool.start()
        for payload in read_tickets():
            await pool.score(decode_ticket(payload), [""])
    except WorkerError as error:
        return str(error)
    finally:
        await pool.close()
    return ""


if __name__ == "__main__":
    sys.exit(main())
