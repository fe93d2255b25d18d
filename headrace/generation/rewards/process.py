"""The parent's side of a reward worker: starts the process, sends requests, kills it.

Requests and replies are msgpack. The process shares no memory, lock or event loop with its parent, and
inherits neither the run's token nor Redis' URL.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import msgspec

from headrace.common.process.child_process import python_path, untrusted_code_environment
from headrace.generation.rewards.worker import LENGTH_BYTES, CompletionScore, ScoreRequest, Setup, SetupReply

Reply = TypeVar("Reply", SetupReply, CompletionScore)
LATE_S = 5.0
"""A worker that meets the deadline itself, for an asynchronous reward, has so much longer to say so."""


class RewardError(Exception):
    """A group could not be scored, or a worker could not be started; the text gives the reason."""

    def __init__(self, text: str, completions: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.completions = completions
        """The completions without a reward."""


class WorkerProcess:
    """A worker process and the connection to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], replies: asyncio.StreamReader, requests: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._replies = replies
        self._requests = requests
        self._is_killed = False

    @property
    def is_usable(self) -> bool:
        return not self._is_killed and self.process.poll() is None

    def kill(self) -> None:
        """Kills the worker's process group and closes the connection, without waiting."""
        if self._is_killed:
            return
        self._is_killed = True
        self._requests.close()
        if self.process.returncode is None:  # not reaped: the process group's id cannot have been reused
            os.killpg(self.process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Waits until a killed worker has ended and the connection is closed; returns its exit status."""
        status = await asyncio.to_thread(self.process.wait)
        with contextlib.suppress(ConnectionError):
            await self._requests.wait_closed()
        return status

    async def set_up(self, setup: Setup, deadline_s: float) -> SetupReply:
        """Returns the reply of a worker that has just started; raises `RewardError` if there is none in time."""
        payload = msgspec.msgpack.encode(setup)
        async with self._killed_on_failure():
            await self._send(payload)
            reply = await self._receive(SetupReply, deadline_s)
            if reply.problem:
                self.kill()
            return reply

    async def score(self, request: ScoreRequest) -> list[CompletionScore]:
        """Returns one score for each completion, in their order. Raises `RewardError` if the next score does not come
        within the request's deadline, or the worker must not be used any more."""
        try:
            payload = msgspec.msgpack.encode(request)
        except UnicodeEncodeError as error:
            raise RewardError(f"{type(error).__name__}: {error}") from error
        scores: list[CompletionScore] = []
        async with self._killed_on_failure():
            await self._send(payload)
            while len(scores) < len(request.completions):
                scores.append(await self._receive(CompletionScore, request.deadline_s, LATE_S))
                if not scores[-1].is_usable:
                    raise RewardError(scores[-1].problem)
        return sorted(scores, key=lambda score: score.index)

    @contextlib.asynccontextmanager
    async def _killed_on_failure(self) -> AsyncIterator[None]:
        """Kills the worker of a failed or cancelled call."""
        try:
            yield
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.kill()  # the process is dead or useless; a dead one keeps its exit status
            raise RewardError(f"the worker's process ended with status {await self.wait()}") from error
        except msgspec.DecodeError as error:
            self.kill()
            raise RewardError(f"{type(error).__name__}: {error}") from error
        except BaseException:
            self.kill()
            raise

    async def _send(self, payload: bytes) -> None:
        self._requests.write(len(payload).to_bytes(LENGTH_BYTES) + payload)
        await self._requests.drain()

    async def _receive(self, kind: type[Reply], deadline_s: float, late_s: float = 0.0) -> Reply:
        try:
            async with asyncio.timeout(deadline_s + late_s):
                length = int.from_bytes(await self._replies.readexactly(LENGTH_BYTES))
                return msgspec.msgpack.decode(await self._replies.readexactly(length), type=kind)
        except TimeoutError as error:
            raise RewardError(f"no answer within the deadline of {deadline_s:g} s") from error


def spawn(connection: socket.socket) -> subprocess.Popen[bytes]:
    """Starts a worker as a new program in its own process group.

    Its import path is the parent's, so that it can import every task that the parent can. It uses one thread, because a
    worker is meant for one core. Its standard input is the connection; the output of a reward goes to the parent's
    standard error. It inherits no other descriptor, and neither the run's token nor Redis' URL.
    """
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "headrace.generation.rewards.worker"],
        stdin=connection.fileno(),
        stdout=2,
        env={**untrusted_code_environment(), **one_thread, "PYTHONPATH": python_path()},
        start_new_session=True,
    )
