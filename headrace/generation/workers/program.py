"""What the programs of all workers do: take over the connection, load the task, limit their memory.

A worker dies with its parent, however the parent dies. Messages are msgpack behind a length.
"""

import ctypes
import os
import resource
import signal
import socket
import traceback
from io import BufferedRWPair
from typing import Any, NamedTuple, TypeVar

import msgspec

from headrace.common.process.child_process import PR_SET_PDEATHSIG
from headrace.common.tasks import Task, load_task
from headrace.generation.workers.outcomes import NotAnOutcome

LENGTH_BYTES = 4
MAX_PROBLEM_CHARS = 500
Received = TypeVar("Received")


class Setup(msgspec.Struct, frozen=True):
    """The first message to a worker."""

    task_name: str
    task_settings: dict[str, Any]
    memory_bytes: int
    parent_pid: int


class SetupReply(msgspec.Struct, frozen=True):
    """The reply to `Setup`; with a problem the worker ends."""

    problem: str = ""
    has_rollout: bool = False
    """The task has `rollout` and no `reward`."""


class LoadedTask(NamedTuple):
    task: Task
    connection: socket.socket
    """To the parent, which expects a `SetupReply` next."""


def load_for_parent() -> LoadedTask | None:
    """Loads the task that the parent names. None if there is no parent any more, or the problem was sent to it."""
    assert ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    connection = _take_over_connection()
    with connection.makefile("rwb") as parent:
        setup = receive(parent, Setup)
        if setup is None or os.getppid() != setup.parent_pid:  # the parent died before prctl could notice
            return None
        try:
            resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
            return LoadedTask(load_task(setup.task_name, setup.task_settings), connection)
        except BaseException as error:  # noqa: BLE001 - a task is foreign code and may raise anything
            send(parent, SetupReply(describe_error(error)))
            return None


def _take_over_connection() -> socket.socket:
    """Moves the connection to the parent away from standard input, where foreign code then reads nothing.

    A process that foreign code forks has no connection: the parent would take its messages for this process's.
    """
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.register_at_fork(after_in_child=lambda: os.close(connection.detach()))
    return connection


def receive(parent: BufferedRWPair, kind: type[Received]) -> Received | None:
    """The next message; None when the parent has closed the connection."""
    length = parent.read(LENGTH_BYTES)
    return msgspec.msgpack.decode(parent.read(int.from_bytes(length)), type=kind) if length else None


def send(parent: BufferedRWPair, message: msgspec.Struct) -> None:
    parent.write(with_length(message))
    parent.flush()


def with_length(message: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(LENGTH_BYTES) + payload


def describe_error(error: BaseException) -> str:
    """The exception and where it was raised; characters that cannot be encoded are escaped."""
    if isinstance(error, NotAnOutcome):
        return str(error)
    raised = "".join(traceback.format_exception_only(error)).strip()[:MAX_PROBLEM_CHARS]
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{raised} ({frame.f_code.co_filename}:{line})".encode(errors="backslashreplace").decode()
