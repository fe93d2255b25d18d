"""The program of a reward worker: scores groups, with one reply for each completion to its parent (`rewards.process`).

It loads the task once, limits its own memory, and dies with its parent, however the parent dies. An exception of a
reward is reported in the reply.
"""

import ctypes
import inspect
import math
import numbers
import os
import reprlib
import resource
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from io import BufferedRWPair
from typing import Any, TypeVar

import msgspec

from headrace.common.process.child_process import PR_SET_PDEATHSIG
from headrace.common.tasks import Task, load_task
from headrace.common.wire import Ticket

LENGTH_BYTES = 4
MAX_PROBLEM_CHARS = 500
NOT_A_NUMBER = "expected a finite number for a reward, got {}"


class Setup(msgspec.Struct, frozen=True):
    """The first message to a worker."""

    task_name: str
    task_settings: dict[str, Any]
    memory_bytes: int
    parent_pid: int


class SetupReply(msgspec.Struct, frozen=True):
    """The reply to `Setup`; with a problem the worker ends."""

    problem: str = ""


class ScoreRequest(msgspec.Struct, frozen=True):
    """Every later message to a worker: the completions of one group."""

    ticket: Ticket
    completions: list[str]
    deadline_s: float
    """The longest that an asynchronous reward may take for one completion. The parent ends a synchronous one."""


class CompletionScore(msgspec.Struct, frozen=True):
    """The result of one completion. A `ScoreRequest` has as many replies as completions, in any order, or fewer, of
    which the last is not usable."""

    index: int
    reward: float | None = None
    """None if there is none, for the reason in `problem`."""
    problem: str = ""
    is_usable: bool = True
    """False if the worker must not be used any more."""


Received = TypeVar("Received", Setup, ScoreRequest)


def run_worker() -> None:
    """Runs the worker until its parent closes the connection."""
    assert ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    parent = take_over_connection()
    setup = receive(parent, Setup)
    if setup is None or os.getppid() != setup.parent_pid:  # the parent died before prctl could notice
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))
        task = load_task(setup.task_name, setup.task_settings)
    except BaseException as error:  # noqa: BLE001 - a task is foreign code and may raise anything
        send(parent, SetupReply(describe_error(error)))
        return
    send(parent, SetupReply())
    score_group = choose_scoring(task)
    while request := receive(parent, ScoreRequest):
        for score in score_group(task, request):
            send(parent, score)


def take_over_connection() -> BufferedRWPair:
    """Moves the connection to the parent away from standard input, where a reward then reads nothing."""
    connection = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return connection.makefile("rwb")


def receive(parent: BufferedRWPair, kind: type[Received]) -> Received | None:
    """The next message; None when the parent has closed the connection."""
    length = parent.read(LENGTH_BYTES)
    return msgspec.msgpack.decode(parent.read(int.from_bytes(length)), type=kind) if length else None


def send(parent: BufferedRWPair, reply: SetupReply | CompletionScore) -> None:
    payload = msgspec.msgpack.encode(reply)
    parent.write(len(payload).to_bytes(LENGTH_BYTES) + payload)
    parent.flush()


def choose_scoring(task: Task) -> Callable[[Task, ScoreRequest], Iterator[CompletionScore]]:
    """The completions of an `async def reward` are scored concurrently, others one after the other."""
    if not inspect.iscoroutinefunction(task.reward):
        return score_group
    from headrace.generation.rewards.async_scoring import ConcurrentScoring  # only these workers load asyncio

    return ConcurrentScoring().score_group


def score_group(task: Task, request: ScoreRequest) -> Iterator[CompletionScore]:
    """Computes the rewards of one group. A failed completion does not affect the others."""
    for index, completion in enumerate(request.completions):
        try:
            score = score_of(index, task.reward(completion, request.ticket))
        except BaseException as error:  # noqa: BLE001 - as above
            score = failed_score(index, error)
        yield score
        if not score.is_usable:
            return


def score_of(index: int, given: Any) -> CompletionScore:
    """The score of a completion for which the task's `reward` returned `given`."""
    reward = to_finite_number(given)
    return CompletionScore(index, reward, "" if reward is not None else NOT_A_NUMBER.format(reprlib.repr(given)))


def failed_score(index: int, error: BaseException) -> CompletionScore:
    """The score of a completion whose reward raised `error`. A worker without memory, or one that was to be ended, is
    not used again."""
    is_usable = isinstance(error, Exception) and not isinstance(error, MemoryError)
    return CompletionScore(index, None, describe_error(error), is_usable)


def to_finite_number(given: Any) -> float | None:
    """The value as a float, None if it is not a finite number; numpy's and torch's scalars and booleans count."""
    if not isinstance(given, numbers.Real) and hasattr(given, "item"):
        given = given.item()
    return float(given) if isinstance(given, numbers.Real) and math.isfinite(given) else None


def describe_error(error: BaseException) -> str:
    """The exception and where it was raised; characters that cannot be encoded are escaped."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    raised = "".join(traceback.format_exception_only(error)).strip()[:MAX_PROBLEM_CHARS]
    return f"{raised} ({frame.f_code.co_filename}:{line})".encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    run_worker()
