"""What is wrong with a task, its prompts or its reward is one line before anything starts, here and in the launcher."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace.common.config import RunConfig
from headrace.common.preflight.recipe import UnavailableHere
from headrace.common.preflight.task import check_task
from headrace.common.tasks import BadRow, Prompt, Split
from headrace.common.wire import Ticket, decode_ticket
from headrace.launcher.check import before_start, trial
from headrace.launcher.check.before_start import preflight_notes
from headrace.launcher.check.estimate_inputs import EstimateInputs
from headrace.launcher.check.prompt_trial import SplitTrial, TaskTrial, try_prompts
from headrace.launcher.check.sections import prompts
from headrace.launcher.check.trial import trial_notes, try_task

USER = [{"role": "user", "content": "1 + 1?"}]


class OnlyTrain:
    """Has nothing held out; unless the hub is out of its reach, as `path` says."""

    def __init__(self, path: str = "") -> None:
        self._path = path

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        if self._path:
            raise ConnectionError("Couldn't reach\nthe hub")
        return iter([Prompt([], {})] if split == "train" else [])

    def reward(self, completion: str, ticket: Ticket) -> float:
        return 0.0


class Told:
    """Its prompts are what is asked for; its reward is 0, or raises."""

    def __init__(self, train: str = "good", reward: str = "good") -> None:
        self._train, self._reward = train, reward

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Any:
        good: Any = Prompt(USER, {"answer": "2"})
        rows: dict[str, list[Any]] = {
            "good": [good],
            "text": [good, Prompt("1 + 1?", {"answer": "2"})],  # type: ignore[arg-type]
            "no role": [Prompt(["1 + 1?"], {"answer": "2"})],  # type: ignore[list-item]
            "array": [Prompt(USER, {"answer": np.arange(3)})],
            "dict": [{"messages": USER, "reference": {}}],
            "half": [good, Prompt([{"role": "user", "content": "\ud83d"}], {"answer": "2"})],
            "bad": [good, BadRow("row 7: expected two texts")],
            "long": [good, Prompt([{"role": "user", "content": "1 + " * 500}], {"answer": "2"})],
        }
        if split == "held_out" or self._train in rows:
            return iter(rows[self._train if split == "train" else "good"])
        return [good] if self._train == "list" else self._raising()

    def _raising(self) -> Iterator[Prompt]:
        yield Prompt(USER, {"answer": "2"})
        raise KeyError("question")

    def reward(self, completion: str, ticket: Ticket) -> Any:
        return 0.0 if self._reward == "good" else {"": completion}["missing"]


class NoSeed(Told):
    def prompts(self, split: Split, epoch: int = 0) -> Any:  # type: ignore[override]
        return iter([])


class NoReward:
    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return iter([Prompt(USER, {})])


class Unloadable(Told):
    def __init__(self) -> None:
        raise RuntimeError("no\nrules")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was, after each test; and no test asks the network."""
    for name, value in (("DATASETS_VERBOSITY", "critical"), ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")):
        monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", os.environ.get("TRANSFORMERS_VERBOSITY", "error"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def config_of(task: dict[str, Any], model: str | Path = "m", **sections: Any) -> RunConfig:
    given = {"model": {"path": str(model), "dtype": "float32"}, "task": task, "sampling": {"max_new_tokens": 40}}
    return RunConfig.model_validate(given | sections)


def told(**settings: str) -> dict[str, Any]:
    return {"name": "tests.launcher.test_task_check:Told", "settings": settings}


def problem_of(task: dict[str, Any]) -> ValueError:
    with pytest.raises(ValueError) as caught:
        check_task(config_of(task))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ({"name": "arithmetik"}, "did you mean 'arithmetic'?"),
        ({"name": "no.such:Task"}, "task 'no.such:Task' cannot be imported"),
        ({"name": "arithmetic", "settings": {"level": 3}}, "rejects its settings {'level': 3}"),
        ({"name": "gsm8k", "settings": {"held_out_split": "train"}}, "task 'gsm8k': train_split and held_out_split"),
        (
            {"name": "tests.support.faulty_tasks:Obedient"},
            "task 'tests.support.faulty_tasks:Obedient' has no train prompts",
        ),
        ({"name": "tests.launcher.test_task_check:OnlyTrain"}, "has no held_out prompts"),
        (
            {"name": "tests.launcher.test_task_check:OnlyTrain", "settings": {"path": "rows.jsonl"}},
            "'rows.jsonl' does not exist",
        ),
        (
            {"name": "tests.launcher.test_task_check:OnlyTrain", "settings": {"path": "tests/rows"}},
            "'tests/rows' does not exist",
        ),
    ],
)
def test_a_task_that_is_wrong_is_refused(task: dict[str, Any], text: str) -> None:
    problem = problem_of(task)
    assert text in str(problem)
    assert not isinstance(problem, UnavailableHere)


@pytest.mark.parametrize(("content", "problem"), [("", "found none"), ('{"question": "a", ', "JSON")])
def test_a_local_data_set_that_is_empty_or_broken_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content)
    settings = {"path": str(rows), "train_split": "train[:50%]", "held_out_split": "train[50%:]"}
    text = str(problem_of({"name": "gsm8k", "settings": settings}))
    assert problem in text and str(rows) in text


def test_a_data_set_out_of_reach_is_not_here() -> None:
    task = {"name": "tests.launcher.test_task_check:OnlyTrain", "settings": {"path": "acme/rows"}}
    problem = problem_of(task)
    assert isinstance(problem, UnavailableHere)
    assert "Couldn't reach the hub" in str(problem)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (
            {"name": "tests.launcher.test_task_check:NoSeed"},
            "its 'prompts' cannot be called: got an unexpected keyword",
        ),
        (
            {"name": "tests.launcher.test_task_check:NoReward"},
            "its 'reward' is missing; expected `def reward(self, completion",
        ),
        ({"name": "tests.launcher.test_task_check:Unloadable"}, "RuntimeError: no rules (" + __file__),
        (told(train="list"), "its train prompts are a list; expected an iterator: `yield` each"),
    ],
)
def test_a_task_of_another_form_is_refused_by_what_was_expected(task: dict[str, Any], text: str) -> None:
    assert text in str(problem_of(task))


@pytest.mark.parametrize(
    ("train", "text"),
    [
        ("no role", "train prompt 0: its messages are list ['1 + 1?']"),
        ("array", "train prompt 0: ticket 0-0 has a reference with a ndarray"),
        ("dict", "train prompt 0: expected a headrace.common.tasks.Prompt, found dict"),
        ("raising", "its train prompt 1: KeyError: 'question' (" + __file__),
    ],
)
def test_prompts_that_can_be_no_tickets_are_refused(train: str, text: str, demo_policy: Path) -> None:
    with pytest.raises(ValueError) as caught:
        try_prompts(config_of(told(train=train), demo_policy), 100)
    assert text in str(caught.value) and str(caught.value).startswith("task 'tests.launcher.test_task_check:Told': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (
            "text",
            "1 of the first 2 train prompts cannot become tickets and are skipped: train prompt 1: its",
        ),
        ("bad", "skipped: train prompt 1: row 7: expected two texts"),
        ("half", "skipped: train prompt 1: it has half of a character"),
        ("long", "1 of the first 2 train prompts do not fit the context and are skipped: the longest has 1,"),
    ],
)
def test_what_the_run_passes_over_is_a_note(train: str, text: str, demo_policy: Path) -> None:
    config = config_of(told(train=train), demo_policy)
    found = try_prompts(config, 100)
    (note,) = trial_notes(found)
    assert text in note
    assert [len(one.lengths) + len(one.refused) for one in found.splits.values()] == [2, 1]
    assert decode_ticket(found.splits["held_out"].ticket).kind == "eval"


def test_so_many_prompts_are_tried_as_are_wanted(demo_policy: Path) -> None:
    config = config_of({"name": "arithmetic"}, demo_policy, evaluation={"num_prompts": 3})
    found = try_prompts(config, 7)
    assert [len(one.lengths) for one in found.splits.values()] == [7, 3]
    assert found.context == 1024, "the demo policy's"


def test_what_a_model_costs_whose_prompts_cannot_be_shared(demo_policy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_policy, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["linear_attention"] * config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    settings = {"actor": {"group_size": 4}, "learner": {"groups_per_step": 5}}
    found = try_prompts(config_of({"name": "arithmetic"}, folder, **settings), 3)
    typical = sorted(found.splits["train"].lengths)[1]
    assert (
        found.cost.startswith("a prompt is computed 4 times")
        and f"{3 * typical * 5:,} tokens a step more" in found.cost
    )
    section = prompts(EstimateInputs(config_of({"name": "arithmetic"}, folder, **settings), found, None, []))
    assert section is not None and section.lines[-1].strip() == found.cost
    assert try_prompts(config_of({"name": "arithmetic"}, demo_policy), 3).cost == ""


def test_completions_that_no_prompt_leaves_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against what the children say, without starting them."""
    config = config_of({"name": "arithmetic"}, sampling={"max_new_tokens": 1000})
    found = TaskTrial(
        context=1024, splits={"train": SplitTrial([25, 30]), "held_out": SplitTrial([24])}, min_new_tokens=1000
    )

    class Answers:
        def __init__(self, answer: bytes) -> None:
            self._answer = answer

        def __enter__(self) -> "Answers":
            return self

        def __exit__(self, *_: object) -> None: ...

        def answer(self, task: str, rest: bytes = b"") -> bytes:
            return self._answer

    def child(module: str, *_: str) -> Answers:
        return Answers(msgspec.msgpack.encode(found) if "prompt" in module else b"")

    monkeypatch.setattr(trial, "child", child)
    with pytest.raises(
        ValueError, match=r"none of the first 2 train prompts leaves room for sampling\.max_new_tokens 1,000"
    ) as caught:
        try_task(config)
    assert "(the shortest has 25); expected at most 999" in str(caught.value)
    found.splits["train"].lengths.append(24)
    (note,) = trial_notes(try_task(config))
    assert note.startswith("2 of the first 3 train prompts do not fit")


def test_what_up_says_before_it_starts(demo_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is skipped, and what takes long on a machine of a million multiplications a second."""
    trials = {"train": SplitTrial([20], ["train prompt 1: no text"]), "held_out": SplitTrial([20])}
    found = TaskTrial(context=1024, splits=trials, flops=1e6)
    monkeypatch.setattr(before_start, "try_task", lambda config: found)
    config = config_of({"name": "arithmetic"}, demo_policy, learner={"device": "cpu"})
    passed, evaluation, step = preflight_notes(config)
    assert passed.startswith("1 of the first 2 train prompts cannot become tickets")
    assert "an evaluation of 256 prompts x 2 completions takes about" in evaluation
    assert step.startswith("a step takes about") and "learner.groups_per_step" in step
    elsewhere = config_of({"name": "arithmetic"}, demo_policy / "nowhere")
    assert preflight_notes(elsewhere) == [passed]


def test_the_real_children_agree_with_the_demo(demo_policy: Path) -> None:
    found = try_task(config_of({"name": "arithmetic"}, demo_policy, redis_url="redis://:secret@nowhere"))
    assert [len(one.lengths) for one in found.splits.values()] == [100, 100]


def test_a_reward_that_fails_on_an_empty_completion_is_refused(demo_policy: Path) -> None:
    with pytest.raises(ValueError, match="its reward of an empty completion: ticket 0-0: ") as caught:
        try_task(config_of(told(reward="raises"), demo_policy))
    assert "KeyError: 'missing'" in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_model_the_task_is_tried_alone() -> None:
    assert try_task(config_of({"name": "arithmetic"}), is_model_here=False).splits == {}
    with pytest.raises(ValueError, match="are a list"):
        try_task(config_of(told(train="list")), is_model_here=False)
