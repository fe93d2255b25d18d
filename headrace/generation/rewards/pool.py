"""Rewards, computed in worker processes that may fail.

A group's completions are one job on one worker. A completion whose reward raises, or is no finite number, is scored
again, twice at most; the worker goes on. A reward that hangs past the deadline, eats memory or ends its process costs
its group a `RewardError` at once: the worker is killed, with its process group, and replaced before its place is used
again. Other groups only ever wait for a free worker.
"""

import asyncio
import logging
import os
import socket
import time
from typing import Any

from headrace.common.metrics.families import SHORT_S, Histogram
from headrace.common.wire import Ticket
from headrace.generation.rewards.process import RewardError, WorkerProcess, spawn
from headrace.generation.rewards.worker import ScoreRequest, Setup, WorkerReply

START_DEADLINE_S = 120.0
RETRY_PAUSES_S = (0.1, 1.0)
"""Before a completion is scored for the second time, and for the third."""
_log = logging.getLogger(__name__)


class TaskError(RewardError):
    """The task cannot be loaded here; another try would come to the same."""


class RewardPool:
    """`num_workers` processes that score groups, each within `deadline_s` a group and `memory_bytes` of memory.

    The memory is address space (RLIMIT_AS) and includes the interpreter, the libraries and the task.
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
        """What workers took for a group, failures included."""
        self.problem = ""
        """Of the latest group that could not be scored; empty once another could."""
        self._is_open = False
        self._free: asyncio.Queue[WorkerProcess] = asyncio.Queue()
        """`num_workers` places, less those in use. A place may hold a dead worker, to be replaced when it is used."""
        self._running: set[WorkerProcess] = set()
        """Every worker whose process may not have ended yet."""

    async def start(self) -> None:
        """Returns when every worker has loaded the task; raises `RewardError` if one cannot.

        The calling thread must outlive the pool: Linux ends a worker with the thread that started it.
        """
        self._is_open = True
        starts = [self._start_worker() for _ in range(self._num_workers)]
        for started in await asyncio.gather(*starts, return_exceptions=True):
            if isinstance(started, BaseException):
                await self.close()
                raise started
            self._free.put_nowait(started)

    async def close(self) -> None:
        """Returns when every worker has ended. A group still being scored, or waiting to be, gets `RewardError`."""
        self._is_open = False
        workers = list(self._running)
        for worker in workers:
            worker.kill()
        await asyncio.gather(*(worker.wait() for worker in workers))

    async def score(self, ticket: Ticket, completions: list[str]) -> list[float]:
        """One finite reward for each completion, in order; raises `RewardError` naming the ticket.

        Waits for a free worker; the deadline counts from when the worker gets the group, each time that it does.
        """
        assert self._is_open, "score() is for after start() and before close()"
        rewards: list[float | None] = [None] * len(completions)
        for pause_s in (0.0, *RETRY_PAUSES_S):
            await asyncio.sleep(pause_s)
            missing = [index for index, reward in enumerate(rewards) if reward is None]
            texts = [completions[index] for index in missing]
            try:
                answer = await self._score_once(ScoreRequest(ticket, texts))
            except (RewardError, OSError) as error:
                self.problem = f"ticket {ticket.id}: {error}"
                raise RewardError(self.problem, texts) from error
            assert len(answer.rewards) == len(missing), (len(answer.rewards), len(missing))
            for index, reward in zip(missing, answer.rewards, strict=True):
                rewards[index] = reward
            scored = [reward for reward in rewards if reward is not None]
            if len(scored) == len(rewards):
                self.problem = ""
                return scored
            first = rewards.index(None)
            _log.info("completion %d of %d: %s", first + 1, len(rewards), answer.problem, extra={"ticket": ticket.id})
        self.problem = f"ticket {ticket.id}: completion {first + 1} of {len(rewards)}: {answer.problem}"
        raise RewardError(self.problem, [completions[i] for i, reward in enumerate(rewards) if reward is None])

    async def _score_once(self, job: ScoreRequest) -> WorkerReply:
        worker = await self._free.get()
        started = time.monotonic()
        try:
            if not worker.is_usable:
                worker.kill()
                worker = await self._start_worker()
            return await worker.request(job, self._deadline_s)
        finally:
            self.seconds.observe(time.monotonic() - started)
            self._free.put_nowait(worker)

    async def _start_worker(self) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        answers, messages = await asyncio.open_unix_connection(sock=ours)
        with theirs:
            if not self._is_open:
                messages.close()
                raise RewardError("the reward pool was closed")
            worker = WorkerProcess(spawn(theirs), answers, messages)
        self._running = {worker, *(other for other in self._running if other.process.poll() is None)}
        answer = await worker.request(self._setup, START_DEADLINE_S)
        if answer.problem:
            raise TaskError(answer.problem)
        return worker
