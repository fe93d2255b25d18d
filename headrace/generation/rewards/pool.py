"""Computes rewards in a pool of worker processes, and replaces workers that fail.

One worker scores all completions of a group: concurrently if the task's `reward` is a coroutine function, else one
after the other. A completion whose reward raises an exception, is not a finite number, or is a coroutine past its
deadline is scored up to two more times. If another reward exceeds the deadline, or any the memory limit, or ends its
process, the group fails at once with `RewardError`. The worker is then killed with its process group, and replaced
before its slot is used again. Other groups only wait for a free worker.

The pool is our own code, because a reward is foreign code that may start processes and use any amount of memory: a
worker is killed by process group and has a memory limit. No library at hand does that. In `concurrent.futures` one
killed worker breaks the whole pool, and the processes that it started survive.
"""

import asyncio
import logging
import os
import time
from typing import Any

from headrace.common.metrics.families import SHORT_S, Histogram
from headrace.common.tasks import Outcome
from headrace.common.wire import Ticket
from headrace.generation.rewards.process import RewardError, RewardWorker
from headrace.generation.rewards.worker import CompletionScore, ScoreRequest
from headrace.generation.workers.process import WorkerError
from headrace.generation.workers.program import Setup

PROGRAM = "headrace.generation.rewards.worker"
START_DEADLINE_S = 120.0
RETRY_PAUSES_S = (0.1, 1.0)
"""Pauses before the second and the third attempt to score a completion."""
_log = logging.getLogger(__name__)


class HasRollout(WorkerError):
    """The task has no `reward`: `rollout` computes it."""


class RewardPool:
    """`num_workers` processes that score groups, with limits of `deadline_s` a completion and `memory_bytes` a process.

    The memory limit is one of address space (RLIMIT_AS); it includes the interpreter, the libraries and the task.
    """

    def __init__(
        self,
        task_name: str,
        task_settings: dict[str, Any],
        *,
        num_workers: int,
        deadline_s: float,
        memory_bytes: int,
    ) -> None:
        assert num_workers > 0, num_workers
        self._setup = Setup(task_name, task_settings, memory_bytes, parent_pid=os.getpid())
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self.seconds = Histogram(SHORT_S)
        """Seconds that workers took for a group, failures included."""
        self.problem = ""
        """The reason why the latest group could not be scored; empty after a group was scored."""
        self._is_open = False
        self._free: asyncio.Queue[RewardWorker] = asyncio.Queue()
        """The `num_workers` slots, less those in use. A dead worker in a slot is replaced when the slot is used."""
        self._running: set[RewardWorker] = set()
        """Every worker whose process may not have ended yet."""

    async def start(self) -> bool:
        """Returns when every worker has loaded the task; False, and no worker is left, if it has `rollout` in place of
        `reward`. Raises `WorkerError` if a worker fails to load it.

        The calling thread must outlive the pool: Linux ends a worker with the thread that started it.
        """
        self._is_open = True
        starts = [self._start_worker() for _ in range(self._num_workers)]
        for started in await asyncio.gather(*starts, return_exceptions=True):
            if isinstance(started, BaseException):
                await self.close()
                if isinstance(started, HasRollout):
                    return False
                raise started
            self._free.put_nowait(started)
        return True

    async def close(self) -> None:
        """Returns when every worker has ended. Groups that are being scored, or wait for it, get `RewardError`."""
        self._is_open = False
        workers = list(self._running)
        for worker in workers:
            worker.kill()
        await asyncio.gather(*(worker.wait() for worker in workers))

    async def score(self, ticket: Ticket, completions: list[str]) -> list[Outcome]:
        """Returns one outcome for each completion, in order; raises `RewardError` naming the ticket.

        Waits for a free worker. The deadline of a completion starts when the worker begins to score it.
        """
        assert self._is_open, "score() is called after start() and before close()"
        outcomes: list[Outcome | None] = [None] * len(completions)
        for pause_s in (0.0, *RETRY_PAUSES_S):
            await asyncio.sleep(pause_s)
            missing = [index for index, outcome in enumerate(outcomes) if outcome is None]
            texts = [completions[index] for index in missing]
            try:
                scores = await self._score_once(ScoreRequest(ticket, texts, self._deadline_s))
            except (WorkerError, OSError) as error:
                self.problem = f"ticket {ticket.id}: {error}"
                raise RewardError(self.problem, texts) from error
            problem = next((score.problem for score in scores if score.outcome is None), "")
            for index, score in zip(missing, scores, strict=True):
                outcomes[index] = score.outcome
            scored = [outcome for outcome in outcomes if outcome is not None]
            if len(scored) == len(outcomes):
                self.problem = ""
                return scored
            first = outcomes.index(None)
            _log.info("completion %d of %d: %s", first + 1, len(outcomes), problem, extra={"ticket": ticket.id})
        self.problem = f"ticket {ticket.id}: completion {first + 1} of {len(outcomes)}: {problem}"
        raise RewardError(self.problem, [completions[i] for i, outcome in enumerate(outcomes) if outcome is None])

    async def _score_once(self, request: ScoreRequest) -> list[CompletionScore]:
        worker = await self._free.get()
        started = time.monotonic()
        try:
            if not worker.is_usable:
                worker.kill()
                worker = await self._start_worker()
            return await worker.score(request)
        finally:
            self.seconds.observe(time.monotonic() - started)
            self._free.put_nowait(worker)

    async def _start_worker(self) -> RewardWorker:
        worker = await RewardWorker.start(PROGRAM, self._check_open)
        self._running = {worker, *(other for other in self._running if not other.has_ended)}
        if (await worker.set_up(self._setup, START_DEADLINE_S)).has_rollout:
            raise HasRollout("the task has `rollout`")
        return worker

    def _check_open(self) -> None:
        if not self._is_open:
            raise RewardError("the reward pool was closed")
