"""What is wrong with a task that has `rollout`, or with the settings of its environment, is one line before a start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.common.config import RunConfig
from headrace.common.environments import Chat, schema
from headrace.common.models.template_probe import TemplateProbe
from headrace.common.preflight.environment import check_template
from headrace.common.preflight.task import load_checked_task
from headrace.common.tasks import Prompt, Split
from headrace.common.wire import Limits, Ticket, decode_ticket
from headrace.launcher.check.estimate_inputs import EstimateInputs
from headrace.launcher.check.prompt_trial import TaskTrial, try_prompts
from headrace.launcher.check.sections import episodes
from headrace.launcher.check.trial import try_task

PREFIX = "tests.launcher.test_environment_check:"


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


class Talks:
    """`after` says what it does with its reply."""

    def __init__(self, after: str = "good", has_tools: bool = False, is_open: bool = False) -> None:
        self._after = after
        self._tools = [schema(add)] if has_tools else []
        self._messages: list[dict[str, Any]] = [] if is_open else [{"role": "user", "content": "1 + 1?"}]

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return iter([Prompt(self._messages, {"answer": "2"}, self._tools)])

    async def rollout(self, chat: Chat, ticket: Ticket) -> float:
        if self._after == "silent":
            return 0.0
        while not (reply := await chat.reply("Go on.")).finish_reason.startswith("max"):
            if self._after == "raises":
                return float(reply.text)
        return 1.0


class Both(Talks):
    def reward(self, completion: str, ticket: Ticket) -> float:
        return 0.0


class Alone(Talks):
    async def rollout(self, chat: Chat) -> float:  # type: ignore[override]
        return 0.0


class Rewards:
    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return iter([Prompt([{"role": "user", "content": "1 + 1?"}], {})])

    def reward(self, completion: str, ticket: Ticket) -> float:
        return 0.0


def config_of(task: str = "Talks", model: str | Path = "m", settings: Any = None, **sections: Any) -> RunConfig:
    given = {
        "model": {"path": str(model), "dtype": "float32"},
        "task": {"name": PREFIX + task, "settings": settings or {}},
    }
    return RunConfig.model_validate(given | {"sampling": {"max_new_tokens": 40}} | sections)


@pytest.mark.parametrize(
    ("task", "sections", "problem"),
    [
        ("Both", {}, "has `reward` and `rollout`; expected one of them"),
        ("Alone", {}, r"its 'rollout' cannot be called: .*; expected `async def rollout\(self, chat, ticket\)`"),
        (
            "Rewards",
            {"environment": {"workers": 2}},
            "the section environment is for tasks with `rollout`, and task .*Rewards",
        ),
        (
            "Talks",
            {"environment": {"max_context_tokens": 5000}, "learner": {"micro_batch_tokens": 4096}},
            r"environment\.max_context_tokens 5000 is more than learner\.micro_batch_tokens 4096",
        ),
        (
            "Talks",
            {"environment": {"episode_deadline_s": 1800}},
            r"environment\.episode_deadline_s 1800 is not less than learner\.starvation_deadline_s 1800",
        ),
        (
            "Talks",
            {"environment": {"workers": 2, "episodes_per_worker": 3}, "actor": {"group_size": 8}},
            r"environment\.workers 2 times environment\.episodes_per_worker 3 is less than actor\.group_size 8",
        ),
    ],
)
def test_what_cannot_work_is_refused(task: str, sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        load_checked_task(config_of(task, **sections))
    assert "\n" not in str(caught.value)


def test_the_defaults_suit_both_kinds_of_tasks() -> None:
    for task in ("Talks", "Rewards"):
        load_checked_task(config_of(task))


def test_a_conversation_longer_than_the_models_context_is_refused(demo_policy: Path) -> None:
    config = config_of(model=demo_policy, environment={"max_context_tokens": 1019})
    with pytest.raises(ValueError, match=r"environment\.max_context_tokens 1019 is more than 1018, which"):
        try_prompts(config, 1)


def test_templates_that_do_not_render_what_a_task_needs_are_refused() -> None:
    def probe(after_user: Any, after_tool: Any, *problems: str) -> TemplateProbe:
        return TemplateProbe(after_user, after_user, after_tool, list(problems))

    check_template(config_of(), probe("kept", "refused"), has_tools=False)
    check_template(config_of(), probe("refused", "kept"), has_tools=True)
    for found in (probe("kept", "refused", "tool message: no"), probe("kept", "not rendered")):
        with pytest.raises(ValueError, match="have tools, and the chat template of 'm' does not render them"):
            check_template(config_of(), found, has_tools=True)
    with pytest.raises(ValueError, match="the chat template of 'm' renders no second turn: user message: no;"):
        check_template(config_of(), probe("refused", "refused", "user message: no"), has_tools=False)


def test_tickets_have_limits_and_tools(demo_policy: Path) -> None:
    config = config_of(model=demo_policy, environment={"max_turns": 5, "max_segments": 3})
    for split, trial in try_prompts(config, 1).splits.items():
        ticket = decode_ticket(trial.ticket)
        assert ticket.limits == Limits(5, 5 * 40, 1018, 3), split
        assert ticket.tools == []
    opened = try_prompts(config_of(model=demo_policy, settings={"is_open": True}), 1)
    assert decode_ticket(opened.splits["train"].ticket).prompt_tokens == []


def test_the_check_says_how_many_episodes_there_are() -> None:
    config = config_of(environment={"workers": 2, "episodes_per_worker": 16}, generation={"max_groups_in_flight": 3})
    section = episodes(EstimateInputs(config, TaskTrial(has_rollout=True), None, []))
    assert section is not None
    assert section.value == {"wanted": 3 * config.actor.group_size, "room": 32}
    assert episodes(EstimateInputs(config, TaskTrial(), None, [])) is None


def test_an_episode_is_tried_with_empty_replies(demo_policy: Path) -> None:
    found = try_task(config_of(model=demo_policy))
    assert found.has_rollout and [len(one.lengths) for one in found.splits.values()] == [1, 1]


@pytest.mark.parametrize(
    ("after", "problem"),
    [("raises", "its episode with empty replies: ValueError: could not convert"), ("silent", "it asked for no reply")],
)
def test_an_episode_that_fails_on_empty_replies_is_refused(after: str, problem: str, demo_policy: Path) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        try_task(config_of(model=demo_policy, settings={"after": after}))
    assert "\n" not in str(caught.value)
