"""Scores a group whose task has an `async def reward`: its completions concurrently, each with a deadline of its own.

So a judge that takes 2 s for a completion takes 2 s for a group, whatever its size. The event loop lives as long as the
worker: a task may keep a client of its judge.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

from headrace.common.tasks import RewardTask
from headrace.generation.rewards.worker import CompletionScore, ScoreRequest, failed_score
from headrace.generation.workers.outcomes import outcome_of


class ConcurrentScoring:
    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def score_group(self, task: RewardTask, request: ScoreRequest) -> Iterator[CompletionScore]:
        """A failed completion, or one past the deadline, does not affect the others."""
        return iter(self._runner.run(_scores(task, request)))


async def _scores(task: Any, request: ScoreRequest) -> list[CompletionScore]:
    return await asyncio.gather(*(_score(task, request, index) for index in range(len(request.completions))))


async def _score(task: Any, request: ScoreRequest, index: int) -> CompletionScore:
    try:
        async with asyncio.timeout(request.deadline_s) as deadline:
            given = await task.reward(request.completions[index], request.ticket)
        return CompletionScore(index, outcome_of(given))
    except TimeoutError as error:
        if deadline.expired():
            return CompletionScore(index, problem=f"no reward within the deadline of {request.deadline_s:g} s")
        return failed_score(index, error)
    except BaseException as error:  # noqa: BLE001 - a reward is foreign code and may raise anything
        return failed_score(index, error)
