"""The parent's side of a reward worker: starts the process, sends requests, kills it.

Each request gets one reply, both in msgpack. The process shares no memory, lock or event loop with its parent, and
inherits neither the run's token nor Redis' URL.
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
    """A group could not be scored, or a worker could not be started; the text gives the reason."""

    def __init__(self, text: str, completions: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.completions = completions
        """The completions without a reward."""


class WorkerProcess:
    """A worker process and the connection to it; each request gets one reply."""

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

    async def request(self, message: Setup | ScoreRequest, deadline_s: float) -> WorkerReply:
        """Returns the worker's reply; raises `RewardError` if there is none within the deadline.

        A worker that does not reply, or reports that it is not usable any more, is killed. So is the worker of a
        cancelled call.
        """
        try:
            payload = msgspec.msgpack.encode(message)
        except UnicodeEncodeError as error:
            raise RewardError(f"{type(error).__name__}: {error}") from error
        is_usable = False
        try:
            async with asyncio.timeout(deadline_s):
                reply = await self._exchange(payload)
            is_usable = reply.is_usable
            if not is_usable and isinstance(message, ScoreRequest):
                raise RewardError(reply.problem)
            return reply
        except TimeoutError as error:
            raise RewardError(f"no answer within the deadline of {deadline_s:g} s") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.kill()  # the process is dead or useless; a dead one keeps its exit status
            raise RewardError(f"the worker's process ended with status {await self.wait()}") from error
        except msgspec.DecodeError as error:
            raise RewardError(f"{type(error).__name__}: {error}") from error
        finally:
            if not is_usable:
                self.kill()

    async def _exchange(self, payload: bytes) -> WorkerReply:
        self._requests.write(len(payload).to_bytes(LENGTH_BYTES) + payload)
        await self._requests.drain()
        length = int.from_bytes(await self._replies.readexactly(LENGTH_BYTES))
        return msgspec.msgpack.decode(await self._replies.readexactly(length), type=WorkerReply)


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
