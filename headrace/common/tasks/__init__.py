"""Tasks: the source of prompts, and the reward of completions.

A task is a class with two methods, chosen by name or by import path (`package.module:Class`). The learner calls
`prompts`. The second is `reward`, which the replicas' reward workers call for each completion, or `rollout`, which
their environment workers call for each episode of several turns. Nothing else of a task is used, except that one with
`rollout` may be an asynchronous context manager.
"""

import difflib
import importlib
import sys
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from headrace.common.wire import Message, Ticket

Split = Literal["train", "held_out"]

BUILT_IN = {
    "arithmetic": "headrace.common.tasks.arithmetic:Arithmetic",
    "calculator": "headrace.common.tasks.calculator:Calculator",
    "gsm8k": "headrace.common.tasks.gsm8k:Gsm8k",
    "guessing": "headrace.common.tasks.guessing:Guessing",
    "judged": "headrace.common.tasks.judged:Judged",
    "reasoning_gym": "headrace.common.tasks.reasoning_gym:ReasoningGym",
}


class Prompt(msgspec.Struct, frozen=True):
    """Chat messages, and the data that the reward needs to judge an answer to them."""

    messages: list[Message]
    """May be empty for a task with `rollout`: the environment then opens the conversation."""
    reference: dict[str, Any]
    tools: list[dict[str, Any]] = []
    """JSON schemas of the tools that an episode offers, as OpenAI's `tools`."""


class Outcome(msgspec.Struct, frozen=True):
    """A reward with what else was measured."""

    reward: float
    metrics: dict[str, float] = {}
    """By name; at most 64. They are reported as means and never trained on."""


class BadRow(msgspec.Struct, frozen=True):
    """A row of the data that makes no prompt. It keeps its position in the order, and the run skips it."""

    reason: str


class Task(Protocol):
    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt | BadRow]:
        """One epoch of prompts; the same arguments give the same prompts in the same order.

        `held_out` ignores `epoch`, and never yields a prompt that `train` yields. Messages are plain text: the name of
        a control token in them (`<|im_end|>`) is not a control token. A prompt that cannot become a ticket is skipped
        and reported; an exception ends the run.
        """
        ...


class RewardTask(Task, Protocol):
    def reward(self, completion: str, ticket: Ticket) -> float | Outcome | Awaitable[float | Outcome]:
        """A finite number for one completion of the ticket's prompt. May raise: the completion is then scored again.

        May be an `async def`: the completions of a group are then scored concurrently, on one event loop that lives as
        long as the worker.
        """
        ...


class RolloutTask(Task, Protocol):
    def rollout(self, chat: Any, ticket: Ticket) -> float | Outcome | Awaitable[float | Outcome]:
        """Plays one episode: talks with the model by `chat`, for as many turns as it likes, and returns a reward.

        An `async def` gets a `headrace.common.environments.Chat` and runs on its worker's event loop, beside other
        episodes. A plain `def` gets a `BlockingChat` and runs in a thread. If it raises, the episode is begun again: it
        must be one that can be begun again from its ticket and `chat.seed`.
        """
        ...


def has_rollout(task: Task) -> bool:
    """Whether the task plays episodes."""
    return callable(getattr(task, "rollout", None))


def add_import_folder(folder: Path) -> None:
    """Makes modules of `folder`, such as the recipe's, importable as tasks; other entries of sys.path come first."""
    entry = str(folder.resolve())
    if entry not in sys.path:
        sys.path.append(entry)


def load_task(name: str, settings: dict[str, Any]) -> Task:
    """The task with this name or import path, constructed with `settings` as keyword arguments.

    Raises `ValueError` if there is no such task or its constructor rejects the settings.
    """
    path = BUILT_IN.get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"task {name!r}: expected one of {sorted(BUILT_IN)} or 'package.module:Class'{hint}")
    try:
        task_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        where = "; expected a module beside the recipe, installed, or on PYTHONPATH" * isinstance(error, ImportError)
        raise ValueError(f"task {name!r} cannot be imported: {error}{where}") from error
    try:
        task: Task = task_class(**settings)
    except TypeError as error:
        raise ValueError(f"task {name!r} rejects its settings {settings}: {error}") from error
    return task
