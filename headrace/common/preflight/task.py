"""Checks of a task before anything starts: its two methods, and prompts in every split.

Every check raises `ValueError` with one line that names the task, the split and what was expected, or
`UnavailableHere` if only this machine lacks the data. A task is foreign code: an error that it raises is reported with
the line that raised it.
"""

import inspect
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.common.config import RunConfig
from headrace.common.models.hub import is_hub_name
from headrace.common.preflight.environment import check_environment
from headrace.common.preflight.recipe import UnavailableHere, one_line
from headrace.common.tasks import BadRow, Prompt, Split, Task, has_rollout, load_task

DATA_SUFFIXES = {".csv", ".json", ".jsonl", ".parquet"}
SPLITS: tuple[Split, Split] = ("train", "held_out")
PROMPTS = "def prompts(self, split, *, seed, epoch)"
REWARD = "def reward(self, completion, ticket)"
ROLLOUT = "async def rollout(self, chat, ticket)"


def check_task(config: RunConfig) -> Task:
    """Loads the task and checks that each split has a prompt."""
    name = config.task.name
    task = load_checked_task(config)
    for split in SPLITS:
        if next(checked_prompts(task, config, split), None) is None:
            raise ValueError(f"task {name!r} has no {split} prompts")
    return task


def load_checked_task(config: RunConfig) -> Task:
    """Loads the task and checks that its methods accept the services' calls."""
    name = config.task.name
    try:
        task = load_task(name, config.task.settings)
    except ValueError as error:
        raise ValueError(_of_task(name, _with_cause(error))) from error
    except Exception as error:
        raise ValueError(
            f"task {name!r} with its settings {config.task.settings}: {describe_exception(error)}"
        ) from error
    is_episodic = has_rollout(task)
    if is_episodic and callable(getattr(task, "reward", None)):
        raise ValueError(f"task {name!r} has `reward` and `rollout`; expected one of them")
    for method, arguments, keywords, expected in (
        ("prompts", ["train"], {"seed": 0, "epoch": 0}, PROMPTS),
        ("rollout", [None, None], {}, ROLLOUT) if is_episodic else ("reward", ["", None], {}, REWARD),
    ):
        if problem := _call_problem(getattr(task, method, None), arguments, keywords):
            other = f", or `{ROLLOUT}`" * (expected == REWARD)
            raise ValueError(f"task {name!r}: its {method!r} {problem}; expected `{expected}`{other}")
    check_environment(config, is_episodic)
    return task


def checked_prompts(task: Task, config: RunConfig, split: Split) -> Iterator[Prompt | BadRow]:
    """The prompts of the first epoch, as an iterator."""
    name = config.task.name
    prompts: Any = _call_task(config, lambda: task.prompts(split, seed=config.seed, epoch=0), f"its {split} prompts")
    if not isinstance(prompts, Iterator):
        raise ValueError(
            f"task {name!r}: its {split} prompts are a {type(prompts).__name__}; expected an iterator: "
            f"`yield` each headrace.common.tasks.Prompt, or return iter(...) of them"
        )
    row = 0
    while True:
        prompt = _call_task(config, lambda: next(prompts, None), f"its {split} prompt {row}")
        if prompt is None:
            return
        yield prompt
        row += 1


def _call_task(config: RunConfig, ask: Any, what: str) -> Any:
    """Calls foreign code; reports its error as the task's, or as data that this machine lacks."""
    name = config.task.name
    try:
        return ask()
    except ConnectionError as error:
        _check_file_exists(name, config.task.settings.get("path"))
        raise UnavailableHere(
            f"task {name!r}: its data set is not on this machine and cannot be downloaded: {one_line(error)}"
        ) from error
    except ValueError as error:
        raise ValueError(_of_task(name, _with_cause(error))) from error
    except Exception as error:
        raise ValueError(f"task {name!r}: {what}: {describe_exception(error)}") from error


def _call_problem(method: Any, arguments: list[Any], keywords: dict[str, Any]) -> str:
    """Why the method cannot be called with these arguments; empty if it can."""
    if not callable(method):
        return "is missing"
    try:
        inspect.signature(method).bind(*arguments, **keywords)
    except TypeError as error:
        return f"cannot be called: {error}"
    return ""


def describe_exception(error: BaseException) -> str:
    """One line with an exception of foreign code and the line that raised it."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    text = one_line(error)
    return f"{type(error).__name__}{': ' * bool(text)}{text} ({frame.f_code.co_filename}:{line})"


def _check_file_exists(task: str, path: Any) -> None:
    """Raises `ValueError` for a missing file, whose name could also be a hub name."""
    if isinstance(path, str) and not Path(path).exists():
        is_path = "/" in path and not is_hub_name(path)
        if is_path or Path(path).suffix in DATA_SUFFIXES:
            raise ValueError(f"task {task!r}: path {path!r} does not exist; expected a folder, a file or a hub name")


def _of_task(name: str, text: str) -> str:
    return text if text.startswith("task ") else f"task {name!r}: {text}"


def _with_cause(error: Exception) -> str:
    """The error with its innermost cause, where `datasets` names the problem of a file."""
    text, cause = one_line(error), error.__cause__
    while cause is not None and cause.__cause__ is not None:
        cause = cause.__cause__
    return text if cause is None or one_line(cause) in text else f"{text}: {one_line(cause)}"
