"""The program of a reward worker: scores groups, with one reply for each completion to its parent (`rewards.process`).

An exception of a reward is reported in the reply.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import cast

import msgspec

from headrace.common.tasks import Outcome, RewardTask, has_rollout
from headrace.common.wire import Ticket
from headrace.generation.workers.outcomes import outcome_of
from headrace.generation.workers.program import SetupReply, describe_error, load_for_parent, receive, send


class ScoreRequest(msgspec.Struct, frozen=True):
    """Every message to a worker after the first: the completions of one group."""

    ticket: Ticket
    completions: list[str]
    deadline_s: float
    """The longest that an asynchronous reward may take for one completion. The parent ends a synchronous one."""


class CompletionScore(msgspec.Struct, frozen=True):
    """The result of one completion. A `ScoreRequest` has as many replies as completions, in any order, or fewer, of
    which the last is not usable."""

    index: int
    outcome: Outcome | None = None
    """None if there is none, for the reason in `problem`."""
    problem: str = ""
    is_usable: bool = True
    """False if the worker must not be used any more."""


def run_worker() -> None:
    """Runs the worker until its parent closes the connection."""
    loaded = load_for_parent()
    if loaded is None:
        return
    with loaded.connection.makefile("rwb") as parent:
        if has_rollout(loaded.task):
            send(parent, SetupReply(has_rollout=True))
            return
        send(parent, SetupReply())
        task = cast(RewardTask, loaded.task)
        score_group = choose_scoring(task)
        while request := receive(parent, ScoreRequest):
            for score in score_group(task, request):
                send(parent, score)


def choose_scoring(task: RewardTask) -> Callable[[RewardTask, ScoreRequest], Iterator[CompletionScore]]:
    """The completions of an `async def reward` are scored concurrently, others one after the other."""
    if not inspect.iscoroutinefunction(task.reward):
        return score_group
    from headrace.generation.rewards.async_scoring import ConcurrentScoring  # only these workers load asyncio

    return ConcurrentScoring().score_group


def score_group(task: RewardTask, request: ScoreRequest) -> Iterator[CompletionScore]:
    """Computes the rewards of one group. A failed completion does not affect the others."""
    for index, completion in enumerate(request.completions):
        try:
            score = CompletionScore(index, outcome_of(task.reward(completion, request.ticket)))
        except BaseException as error:  # noqa: BLE001 - a reward is foreign code and may raise anything
            score = failed_score(index, error)
        yield score
        if not score.is_usable:
            return


def failed_score(index: int, error: BaseException) -> CompletionScore:
    """The score of a completion whose reward raised `error`. A worker without memory, or one that was to be ended, is
    not used again."""
    is_usable = isinstance(error, Exception) and not isinstance(error, MemoryError)
    return CompletionScore(index, None, describe_error(error), is_usable)


if __name__ == "__main__":
    run_worker()
