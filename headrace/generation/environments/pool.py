"""The environment workers of a replica: each holds many episodes; one that has died or was killed is replaced.

A worker is started with the pool, and again when its place is used. An episode that may be what ended its worker is
played in a process of its own, which ends with it.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.common.config import TaskConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.tasks import Outcome
from headrace.generation.environments.deadlines import EpisodeDeadlines
from headrace.generation.environments.messages import EpisodeStart
from headrace.generation.environments.process import EnvironmentWorker, EpisodeFailed, EpisodeInterrupted
from headrace.generation.workers.process import WorkerError
from headrace.generation.workers.program import Setup

PROGRAM = "headrace.generation.environments.worker"
START_DEADLINE_S = 300.0
"""Large libraries of environments take a minute to import on a busy machine."""

MAX_ISOLATED = 8
"""Largest number of processes, besides the workers, that hold an episode alone."""


@dataclass
class _Slot:
    """The place of one worker."""

    worker: EnvironmentWorker
    num_episodes: int = 0
    replacing: asyncio.Lock = field(default_factory=asyncio.Lock)


class EnvironmentPool:
    def __init__(self, task: TaskConfig, settings: EnvironmentConfig) -> None:
        self._setup = Setup(task.name, task.settings, settings.memory_bytes, parent_pid=os.getpid())
        self._settings = settings
        self._is_open = False
        self._slots: list[_Slot] = []
        self._free = asyncio.Semaphore(settings.workers * settings.episodes_per_worker)
        self._isolated = asyncio.Semaphore(MAX_ISOLATED)
        self._running: set[EnvironmentWorker] = set()
        """Every worker whose process may not have ended yet."""

    async def start(self) -> None:
        """Returns when every worker has loaded the task; raises `WorkerError` if one fails to.

        The calling thread must outlive the pool: Linux ends a worker with the thread that started it.
        """
        self._is_open = True
        starts = [self._start_worker() for _ in range(self._settings.workers)]
        for started in await asyncio.gather(*starts, return_exceptions=True):
            if isinstance(started, BaseException):
                await self.close()
                raise started
            self._slots.append(_Slot(started))

    async def close(self) -> None:
        """Returns when every worker has ended; their episodes are interrupted."""
        self._is_open = False
        await asyncio.gather(*(worker.close() for worker in self._running))

    @property
    def num_playing(self) -> int:
        return sum(slot.num_episodes for slot in self._slots)

    async def run(self, episode: EpisodeStart, environment_s: Callable[[], float], is_suspect: bool = False) -> Outcome:
        """Plays an episode once there is room for it; its deadlines (`EpisodeDeadlines`) begin then.

        `is_suspect`: an earlier run was interrupted by the end of its worker. Raises `EpisodeFailed` or
        `EpisodeInterrupted`.
        """
        assert self._is_open, "run() is called after start() and before close()"
        try:
            if is_suspect:
                return await self._run_alone(episode, environment_s)
            await self._free.acquire()
            self._check_open()
            slot = min(self._slots, key=lambda one: one.num_episodes)
            slot.num_episodes += 1
            try:
                worker = await self._usable_worker(slot)
            except BaseException:
                self._release(slot)
                raise
            deadlines = EpisodeDeadlines(self._settings, environment_s)
            return await worker.play(episode, deadlines, lambda: self._release(slot))
        except WorkerError as error:
            raise EpisodeFailed(f"no environment worker for it: {error}") from error

    async def _run_alone(self, episode: EpisodeStart, environment_s: Callable[[], float]) -> Outcome:
        async with self._isolated:
            worker = await self._start_worker()
            try:
                return await worker.play(episode, EpisodeDeadlines(self._settings, environment_s), lambda: None)
            finally:
                worker.kill()

    async def _usable_worker(self, slot: _Slot) -> EnvironmentWorker:
        async with slot.replacing:
            if not slot.worker.is_usable:
                slot.worker.kill()
                slot.worker = await self._start_worker()
            return slot.worker

    def _release(self, slot: _Slot) -> None:
        slot.num_episodes -= 1
        self._free.release()

    async def _start_worker(self) -> EnvironmentWorker:
        worker = await EnvironmentWorker.start(PROGRAM, self._check_open)
        self._running = {worker, *(other for other in self._running if not other.has_ended)}
        await worker.set_up(self._setup, START_DEADLINE_S)
        worker.watch()
        return worker

    def _check_open(self) -> None:
        if not self._is_open:
            raise EpisodeInterrupted("the replica ends")
