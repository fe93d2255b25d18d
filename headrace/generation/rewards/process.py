"""A reward worker as its parent sees it: a process that owes one answer to each message, in msgpack.

It shares no memory, lock or event loop with us, and inherits neither the run's token nor Redis' URL.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from headrace.common.process.child_process import python_path, untrusted_code_environment
from headrace.generation.rewards.worker import LENGTH_BYTES, ScoreRequest, Setup, WorkerReply


class RewardError(Exception):
    """A group could not be scored, or a worker not be started; the text says why."""

    def __init__(self, text: str, completions: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.completions = completions
        """Those without a reward."""


class WorkerProcess:
    """A worker as its parent sees it: a process that owes one answer to each message."""

    def __init__(
        self, process: subprocess.Popen[bytes], answers: asyncio.StreamReader, messages: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._answers = answers
        self._messages = messages
        self._is_killed = False

    @property
    def is_usable(self) -> bool:
        return not self._is_killed and self.process.poll() is None

    def kill(self) -> None:
        """Ends what is left of it, its process group and the connection, without waiting."""
        if self._is_killed:
            return
        self._is_killed = True
        self._messages.close()
        if self.process.returncode is None:  # not reaped, so that the process group is still its own
            os.killpg(self.process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """The exit status of a killed worker, once its process has ended and the connection is closed."""
        status = await asyncio.to_thread(self.process.wait)
        with contextlib.suppress(ConnectionError):
            await self._messages.wait_closed()
        return status

    async def request(self, message: Setup | ScoreRequest, deadline_s: float) -> WorkerReply:
        """The answer. A worker that gives none, or says that it is not sound, is killed, and so it is if the caller is
        cancelled. Raises `RewardError` where there is none."""
        try:
            payload = msgspec.msgpack.encode(message)
        except UnicodeEncodeError as error:
            raise RewardError(f"{type(error).__name__}: {error}") from error
        is_usable = False
        try:
            async with asyncio.timeout(deadline_s):
                answer = await self._exchange(payload)
            is_usable = answer.is_usable
            if not is_usable and isinstance(message, ScoreRequest):
                raise RewardError(answer.problem)
            return answer
        except TimeoutError as error:
            raise RewardError(f"no answer within the deadline of {deadline_s:g} s") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.kill()  # it is dead already, or as good as: a dead process keeps its own exit status
            raise RewardError(f"the worker's process ended with status {await self.wait()}") from error
        except msgspec.DecodeError as error:
            raise RewardError(f"{type(error).__name__}: {error}") from error
        finally:
            if not is_usable:
                self.kill()

    async def _exchange(self, payload: bytes) -> WorkerReply:
        self._messages.write(len(payload).to_bytes(LENGTH_BYTES) + payload)
        await self._messages.drain()
        length = int.from_bytes(await self._answers.readexactly(LENGTH_BYTES))
        return msgspec.msgpack.decode(await self._answers.readexactly(length), type=WorkerReply)


def spawn(connection: socket.socket) -> subprocess.Popen[bytes]:
    """The worker as a new program, in its own process group: it shares no memory, lock or event loop with us.

    Its import path is ours, so that a task may lie wherever we can import it; one worker is meant for one core.
    Its standard input is the connection, and what a reward prints goes to our standard error. It inherits neither
    another descriptor nor the run's token nor Redis' URL.
    """
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "headrace.generation.rewards.worker"],
        stdin=connection.fileno(),
        stdout=2,
        env={**untrusted_code_environment(), **one_thread, "PYTHONPATH": python_path()},
        start_new_session=True,
    )
