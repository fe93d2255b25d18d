"""The parent's side of a worker: starts the process, sends and receives messages, kills it.

The process shares no memory, lock or event loop with its parent, and inherits neither the run's token nor Redis' URL.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, TypeVar

import msgspec

from headrace.common.process.child_process import python_path, untrusted_code_environment
from headrace.generation.workers.program import LENGTH_BYTES, Setup, SetupReply, with_length

MAX_REPLY_BYTES = 1 << 20
Reply = TypeVar("Reply")


class WorkerError(Exception):
    """A worker could not be started, or did not do what it was asked to; the text gives the reason."""


class TaskError(WorkerError):
    """The task cannot be loaded on this machine; a retry would fail in the same way."""


class WorkerProcess:
    """A worker process and the connection to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], replies: asyncio.StreamReader, requests: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._replies = replies
        self._requests = requests
        self._is_killed = False

    @classmethod
    async def start(cls, module: str, check_open: Callable[[], None]) -> Self:
        """Starts `module` as a worker, unless `check_open` raises just before. The calling thread must outlive it:
        Linux ends a worker with the thread that started it."""
        parent_end, worker_end = socket.socketpair()
        replies, requests = await asyncio.open_unix_connection(sock=parent_end)
        with worker_end:
            try:
                check_open()
            except Exception:
                requests.close()
                raise
            return cls(_spawn(module, worker_end), replies, requests)

    @property
    def is_usable(self) -> bool:
        """Does not reap a dead process, so that `kill` still reaches its process group."""
        if self._is_killed or self.process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    @property
    def has_ended(self) -> bool:
        return self._is_killed and self.process.poll() is not None

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
        """The reply of a worker that has just started. Raises `WorkerError` if there is none in time, `TaskError` if
        the task cannot be loaded."""
        async with self.killed_on_failure():
            await self.send(encode_message(setup))
            reply = await self.receive(SetupReply, deadline_s)
            if reply.problem:
                raise TaskError(reply.problem)
            return reply

    @contextlib.asynccontextmanager
    async def killed_on_failure(self) -> AsyncIterator[None]:
        """Kills the worker of a failed or cancelled call. Raises `WorkerError` if the connection has failed."""
        try:
            yield
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            self.kill()  # the process is dead or useless; a dead one keeps its exit status
            raise WorkerError(f"the worker's process ended with status {await self.wait()}") from error
        except msgspec.DecodeError as error:
            self.kill()
            raise WorkerError(f"{type(error).__name__}: {error}") from error
        except BaseException:
            self.kill()
            raise

    async def send(self, payload: bytes) -> None:
        """`payload`: of `encode_message`."""
        self._requests.write(payload)
        await self._requests.drain()

    async def receive(self, kind: type[Reply], deadline_s: float | None = None, late_s: float = 0.0) -> Reply:
        """The next message. A worker that keeps the deadline itself has `late_s` longer to say so."""
        try:
            async with asyncio.timeout(None if deadline_s is None else deadline_s + late_s):
                length = int.from_bytes(await self._replies.readexactly(LENGTH_BYTES))
                if length > MAX_REPLY_BYTES:
                    raise WorkerError(f"a message of {length:,} bytes, expected at most {MAX_REPLY_BYTES:,}")
                return msgspec.msgpack.decode(await self._replies.readexactly(length), type=kind)
        except TimeoutError as error:
            raise WorkerError(f"no answer within the deadline of {deadline_s:g} s") from error


def encode_message(message: msgspec.Struct) -> bytes:
    """Raises `WorkerError` if a text of the message cannot be encoded."""
    try:
        return with_length(message)
    except UnicodeEncodeError as error:
        raise WorkerError(f"{type(error).__name__}: {error}") from error


def _spawn(module: str, connection: socket.socket) -> "subprocess.Popen[bytes]":
    """Starts a worker as a new program in its own process group.

    Its import path is the parent's, so that it can import every task that the parent can. It uses one thread, because a
    worker is meant for one core. Its standard input is the connection; the output of foreign code goes to the parent's
    standard error. It inherits no other descriptor, and neither the run's token nor Redis' URL.
    """
    one_thread: dict[str, Any] = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=connection.fileno(),
        stdout=2,
        env={**untrusted_code_environment(), **one_thread, "PYTHONPATH": python_path()},
        start_new_session=True,
    )
