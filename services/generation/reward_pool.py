"""Rewards, computed in worker processes that may fail.

A group's completions are one job on one worker. A completion whose reward raises, or is no finite number, is scored
again, twice at most; the worker goes on. A reward that hangs past the deadline, eats memory or ends its process costs
its group a `RewardError` at once: the worker is killed, with its process group, and replaced before its place is used
again. Other groups only ever wait for a free worker. Between pool and worker is msgpack: one answer a message.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from common.child_process import environment_of_foreign_code, import_path
from common.metrics.families import SHORT_S, Histogram
from common.wire import Ticket
from services.generation.reward_worker import LENGTH_BYTES, Answer, Job, Setup

START_DEADLINE_S = 120.0
PAUSES_S = (0.1, 1.0)
"""Before a completion is scored for the second time, and for the third."""
_log = logging.getLogger(__name__)


class RewardError(Exception):
    """A group could not be scored, or a worker not be started; the text says why."""

    def __init__(self, text: str, completions: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.completions = completions
        """Those without a reward."""


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
        self._open = False
        self._free: asyncio.Queue[Worker] = asyncio.Queue()
        """`num_workers` places, less those in use. A place may hold a dead worker, to be replaced when it is used."""
        self._running: set[Worker] = set()
        """Every worker whose process may not have ended yet."""

    async def start(self) -> None:
        """Returns when every worker has loaded the task; raises `RewardError` if one cannot.

        The calling thread must outlive the pool: Linux ends a worker with the thread that started it.
        """
        self._open = True
        starts = [self._start_worker() for _ in range(self._num_workers)]
        for started in await asyncio.gather(*starts, return_exceptions=True):
            if isinstance(started, BaseException):
                await self.close()
                raise started
            self._free.put_nowait(started)

    async def close(self) -> None:
        """Returns when every worker has ended. A group still being scored, or waiting to be, gets `RewardError`."""
        self._open = False
        workers = list(self._running)
        for worker in workers:
            worker.kill()
        await asyncio.gather(*(worker.ended() for worker in workers))

    async def score(self, ticket: Ticket, completions: list[str]) -> list[float]:
        """One finite reward for each completion, in order; raises `RewardError` naming the ticket.

        Waits for a free worker; the deadline counts from when the worker gets the group, each time that it does.
        """
        assert self._open, "score() is for after start() and before close()"
        rewards: list[float | None] = [None] * len(completions)
        for pause_s in (0.0, *PAUSES_S):
            await asyncio.sleep(pause_s)
            missing = [index for index, reward in enumerate(rewards) if reward is None]
            texts = [completions[index] for index in missing]
            try:
                answer = await self._score_once(Job(ticket, texts))
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

    async def _score_once(self, job: Job) -> Answer:
        worker = await self._free.get()
        started = time.monotonic()
        try:
            if not worker.is_usable:
                worker.kill()
                worker = await self._start_worker()
            return await worker.ask(job, self._deadline_s)
        finally:
            self.seconds.observe(time.monotonic() - started)
            self._free.put_nowait(worker)

    async def _start_worker(self) -> "Worker":
        ours, theirs = socket.socketpair()
        answers, messages = await asyncio.open_unix_connection(sock=ours)
        with theirs:
            if not self._open:
                messages.close()
                raise RewardError("the reward pool was closed")
            worker = Worker(spawn(theirs), answers, messages)
        self._running = {worker, *(other for other in self._running if other.process.poll() is None)}
        answer = await worker.ask(self._setup, START_DEADLINE_S)
        if answer.problem:
            raise TaskError(answer.problem)
        return worker


class Worker:
    """A worker as its parent sees it: a process that owes one answer to each message."""

    def __init__(
        self, process: subprocess.Popen[bytes], answers: asyncio.StreamReader, messages: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._answers = answers
        self._messages = messages
        self._killed = False

    @property
    def is_usable(self) -> bool:
        return not self._killed and self.process.poll() is None

    def kill(self) -> None:
        """Ends what is left of it, its process group and the connection, without waiting."""
        if self._killed:
            return
        self._killed = True
        self._messages.close()
        if self.process.returncode is None:  # not reaped, so that the process group is still its own
            os.killpg(self.process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """The exit status of a killed worker, once its process has ended and the connection is closed."""
        status = await asyncio.to_thread(self.process.wait)
        with contextlib.suppress(ConnectionError):
            await self._messages.wait_closed()
        return status

    async def ask(self, message: Setup | Job, deadline_s: float) -> Answer:
        """The answer. A worker that gives none, or says that it is not sound, is killed, and so it is if the caller is
        cancelled. Raises `RewardError` where there is none."""
        try:
            payload = msgspec.msgpack.encode(message)
        except UnicodeEncodeError as error:
            raise RewardError(f"{type(error).__name__}: {error}") from error
        is_sound = False
        try:
            async with asyncio.timeout(deadline_s):
                answer = await self._exchange(payload)
            is_sound = answer.is_sound
            if not is_sound and isinstance(message, Job):
                raise RewardError(answer.problem)
            return answer
        except TimeoutError as error:
            raise RewardError(f"no answer within the deadline of {deadline_s:g} s") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.kill()  # it is dead already, or as good as: a dead process keeps its own exit status
            raise RewardError(f"the worker's process ended with status {await self.ended()}") from error
        except msgspec.DecodeError as error:
            raise RewardError(f"{type(error).__name__}: {error}") from error
        finally:
            if not is_sound:
                self.kill()

    async def _exchange(self, payload: bytes) -> Answer:
        self._messages.write(len(payload).to_bytes(LENGTH_BYTES) + payload)
        await self._messages.drain()
        length = int.from_bytes(await self._answers.readexactly(LENGTH_BYTES))
        return msgspec.msgpack.decode(await self._answers.readexactly(length), type=Answer)


def spawn(connection: socket.socket) -> subprocess.Popen[bytes]:
    """The worker as a new program, in its own process group: it shares no memory, lock or event loop with us.

    Its import path is ours, so that a task may lie wherever we can import it; one worker is meant for one core.
    Its standard input is the connection, and what a reward prints goes to our standard error. It inherits neither
    another descriptor nor the run's token nor Redis' URL.
    """
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "services.generation.reward_worker"],
        stdin=connection.fileno(),
        stdout=2,
        env={**environment_of_foreign_code(), **one_thread, "PYTHONPATH": import_path()},
        start_new_session=True,
    )
