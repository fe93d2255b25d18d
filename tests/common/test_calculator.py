"""The calculator task: what the tool computes and refuses, what an episode is, and what is held out."""

import asyncio
import contextlib
import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.common.environments import Chat
from headrace.common.tasks import Outcome, load_task
from headrace.common.tasks.arithmetic import Problem
from headrace.common.tasks.calculator import (
    MAX_EXPRESSION_CHARS,
    OPERANDS,
    Calculator,
    calculate,
    expression,
    held_out_problems,
    prompt_of,
    train_problems,
)
from tests.support.factories import make_ticket

PROBLEM = Problem("+*", (13, 5, 40), name="Ada", item="pens")


def play(*replies: str | list[dict[str, Any]]) -> tuple[Outcome, list[str]]:
    """The outcome of an episode in which the model writes texts or calls the tool, and the tool's answers."""
    prompt, script = prompt_of(PROBLEM), iter(replies)

    async def send(body: dict[str, Any]) -> Any:
        assert body["tools"] == prompt.tools
        reply = next(script)
        if isinstance(reply, str):
            return {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
        message = {"role": "assistant", "content": "", "tool_calls": reply}
        return {"message": message, "finish_reason": "tool_calls"}

    chat = Chat(send, prompt.messages, prompt.tools, base_url="", api_key="", model="")
    ticket = make_ticket(messages=prompt.messages, reference=prompt.reference, tools=prompt.tools)
    outcome = asyncio.run(Calculator().rollout(chat, ticket))
    return outcome, [message["content"] for message in chat.messages if message["role"] == "tool"]


def calls(*expressions: str, name: str = "calculate") -> list[dict[str, Any]]:
    functions = [{"name": name, "arguments": json.dumps({"expression": one})} for one in expressions]
    return [{"id": str(place), "type": "function", "function": one} for place, one in enumerate(functions)]


def test_the_answer_after_a_call_is_rewarded() -> None:
    outcome, results = play(calls("(13 + 5) * 40"), "720")
    assert results == ["720"]
    assert outcome == Outcome(1.0, {"calls": 1.0, "failed_calls": 0.0})


def test_several_calls_are_answered_and_the_answer_alone_counts() -> None:
    outcome, results = play(calls("13 + 5", "18 * 40"), calls("0 - 1"), "18")
    assert results == ["18", "720", "-1"]
    assert outcome == Outcome(0.0, {"calls": 3.0, "failed_calls": 0.0})


def test_an_answer_without_a_call_is_judged_as_any_other() -> None:
    assert play("720")[0] == Outcome(1.0, {"calls": 0.0, "failed_calls": 0.0})
    assert play("72")[0] == Outcome(0.0, {"calls": 0.0, "failed_calls": 0.0})
    assert play("")[0].reward == 0.0
    assert play("720 pens")[0].reward == 0.0


def test_the_model_reads_what_was_wrong_with_a_call() -> None:
    outcome, results = play(calls("13 +"), calls("13", name="compute"), calls("13 / 5"), "720")
    assert [result.partition(":")[0] for result in results] == ["error"] * 3
    assert "compute" in results[1]
    assert results[2].endswith("'13 / 5' is not understood; expected whole numbers, +, -, * and parentheses")
    assert outcome == Outcome(1.0, {"calls": 3.0, "failed_calls": 3.0})


@pytest.mark.parametrize(
    ("text", "value"),
    [("3 * (4 + 5)", "27"), ("2 + 3 * 4", "14"), ("-3 - -4", "1"), ("7", "7"), ("2*(3-(4+5))", "-12")],
)
def test_calculate(text: str, value: str) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "2 ** 9", "9 / 3", "1.5", "True", "'1' * 9", "f(1)", "[1] * 9", "1; 2", "a.b", "1 if 2 else 3", "~1"],
)
def test_anything_but_sums_and_products_of_whole_numbers_is_refused(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        calculate(text)


def test_a_long_expression_and_a_large_value_are_refused() -> None:
    with pytest.raises(ValueError, match=f"has 201 characters, expected at most {MAX_EXPRESSION_CHARS}"):
        calculate("1" * 201)
    with pytest.raises(ValueError, match="more than 30 digits"):
        calculate(" * ".join(["99999999"] * 4))


@given(st.text(alphabet="0123456789+-*() ~.xj_'\"[]{}:,\\\n\x00", max_size=220))
def test_any_text_has_a_value_or_is_refused(text: str) -> None:
    with contextlib.suppress(ValueError, SyntaxError):
        int(calculate(text))


@given(
    st.sampled_from(["++", "+-", "--", "*+", "*-", "+*", "+", "-", "*"]), st.tuples(*[st.sampled_from(OPERANDS)] * 3)
)
def test_an_expression_has_the_value_of_its_strategy(strategy: str, operands: tuple[int, ...]) -> None:
    problem = Problem(strategy, operands[: len(strategy) + 1], name="Ada", item="pens")
    assert calculate(expression(strategy, operands)) == problem.answer


def test_the_prompt_offers_the_tool() -> None:
    prompt = prompt_of(PROBLEM)
    assert prompt.reference == {"answer": "720"}
    (tool,) = prompt.tools
    assert tool["function"]["name"] == "calculate"
    assert list(tool["function"]["parameters"]["properties"]) == ["expression"]


def test_no_held_out_problem_is_ever_trained_on() -> None:
    held_out = {(problem.strategy, problem.operands) for problem in held_out_problems()}
    train = {(one.strategy, one.operands) for one in islice(train_problems(seed=0, epoch=0), 20_000)}
    assert len(held_out) > 1024
    assert not held_out & train


def test_held_out_is_one_fixed_list_and_train_depends_on_seed_and_epoch() -> None:
    task = load_task("calculator", {})

    def first(split: Any, seed: int, epoch: int) -> Sequence[Any]:
        return list(islice(task.prompts(split, seed=seed, epoch=epoch), 50))

    assert first("held_out", 0, 0) == first("held_out", 7, 3)
    assert first("train", 1, 0) == first("train", 1, 0)
    assert first("train", 1, 0) != first("train", 2, 0)
    assert first("train", 1, 0) != first("train", 1, 1)
