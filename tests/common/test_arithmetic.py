"""The arithmetic task: what it holds out, what its worked answers say, and what it rewards."""

import operator
import re
from itertools import islice
from typing import cast

import pytest

from headrace.common.tasks import RewardTask, load_task
from headrace.common.tasks.arithmetic import (
    HELD_OUT_SHARE,
    HELD_OUT_SIZE,
    TEMPLATES,
    Arithmetic,
    Problem,
    held_out_problems,
    is_held_out,
    score,
    train_problems,
)
from headrace.common.wire import Sampling, Ticket

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def train_sample(count: int = 20_000, seed: int = 0) -> list[Problem]:
    return list(islice(train_problems(seed=seed, epoch=0), count))


def checked_answer(worked_answer: str) -> str:
    """The final answer, after recomputing every line independently."""
    *lines, last = worked_answer.split("\n")
    results: list[int] = []
    for line in lines:
        match = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line)
        assert match, line
        left, operation, right, result = match.groups()
        assert OPERATIONS[operation](int(left), int(right)) == int(result), line
        assert not results or results[-1] == int(left), worked_answer
        results.append(int(result))
    assert last == f"#### {results[-1]}"
    return str(results[-1])


def test_two_steps_are_worked_as_in_gsm8k() -> None:
    problem = Problem("+-", (13, 15, 12), name="Ada", item="pens")
    assert problem.question == "Ada has 13 pens, buys 15 more and gives away 12. How many are left?"
    assert problem.demonstration == "13 + 15 = 28\n28 - 12 = 16\n#### 16"
    assert problem.prompt.messages == [{"role": "user", "content": problem.question}]
    assert problem.prompt.reference == {"answer": "16"}
    # 13 - 15 is negative, so that the first operation is never mistaken.
    assert problem.slips == ["13 + 15 = 28\n28 + 12 = 40\n#### 40", "13 + 15 = 28\n#### 28"]


def test_a_slip_that_gives_the_right_answer_is_not_produced() -> None:
    # Taking 2 * 2 for 2 + 2 would go unnoticed, and 4 - 5 would be negative.
    assert Problem("*+", (2, 2, 5), name="Ada", item="pens").slips == [
        "2 - 2 = 0\n0 + 5 = 5\n#### 5",
        "2 * 2 = 4\n4 * 5 = 20\n#### 20",
        "2 * 2 = 4\n#### 4",
    ]


def test_every_demonstration_is_right_and_every_slip_is_wrong_by_its_strategy_alone() -> None:
    for problem in train_sample() + list(held_out_problems()):
        assert checked_answer(problem.demonstration) == problem.answer
        assert score(problem.demonstration, problem.answer) == 1.0
        assert problem.slips
        for slip in problem.slips:
            assert checked_answer(slip) != problem.answer
            assert score(slip, problem.answer) == 0.0


def test_six_two_step_and_three_one_step_templates_come_equally_often() -> None:
    assert sorted(len(strategy) for strategy in TEMPLATES) == [1, 1, 1, 2, 2, 2, 2, 2, 2]
    problems = train_sample(9000)
    for strategy in TEMPLATES:
        assert 800 < sum(problem.strategy == strategy for problem in problems) < 1200


def test_operands_are_in_the_question_and_at_most_twenty() -> None:
    for problem in train_sample(2000):
        assert re.findall(r"\d+", problem.question) == [str(operand) for operand in problem.operands]
        assert all(2 <= operand <= 20 for operand in problem.operands)


def test_no_held_out_problem_is_ever_trained_on() -> None:
    held_out = {(problem.strategy, problem.operands) for problem in held_out_problems()}
    train = {(problem.strategy, problem.operands) for problem in train_sample()}
    assert len(held_out) > 1000
    assert not held_out & train
    assert not {problem.question for problem in held_out_problems()} & {problem.question for problem in train_sample()}


def test_the_hash_holds_out_the_share_it_says() -> None:
    pairs = [(left, right) for left in range(2, 21) for right in range(2, 21)]
    share = sum(is_held_out(strategy, pair) for strategy in TEMPLATES for pair in pairs) / (len(TEMPLATES) * len(pairs))
    assert abs(share - HELD_OUT_SHARE) < 0.03


def test_held_out_is_one_fixed_list_of_distinct_problems() -> None:
    task = Arithmetic()
    first = list(task.prompts("held_out", seed=0, epoch=0))
    assert first == list(task.prompts("held_out", seed=7, epoch=3))
    assert len(first) == HELD_OUT_SIZE >= 4096
    assert len({prompt.messages[0]["content"] for prompt in first}) == HELD_OUT_SIZE
    # Fixed across processes and versions of the code: recorded evaluations refer to these very problems.
    assert first[0].messages[0]["content"] == "Dana had 18 books, lost 4 and sold 9. How many remain?"


def test_train_depends_on_seed_and_epoch_alone() -> None:
    def sample(seed: int, epoch: int) -> list[str]:
        return [p.messages[0]["content"] for p in islice(Arithmetic().prompts("train", seed=seed, epoch=epoch), 200)]

    assert sample(1, 0) == sample(1, 0)
    assert sample(1, 0) != sample(2, 0)
    assert sample(1, 0) != sample(1, 1)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("13 + 3 = 16\n#### 16", 1.0),
        ("#### 16", 1.0),
        ("#### 16\n", 1.0),
        ("#### 9\n#### 16", 1.0),
        ("#### 16\n#### 9", 0.0),
        ("#### 16.", 0.0),
        ("#### 16.0", 0.0),
        ("#### 016", 0.0),
        ("#### +16", 0.0),
        ("#### 1 6", 0.0),
        ("#### 16 apples", 0.0),
        ("#### 16 16", 0.0),
        ("#### 116", 0.0),
        ("#### \u0661\u0666", 0.0),
        ("####", 0.0),
        ("### 16", 0.0),
        ("16", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_exact_answer_after_the_last_mark_is_rewarded(completion: str, reward: float) -> None:
    ticket = Ticket(
        id="t",
        kind="train",
        prompt_tokens=[1],
        messages=[],
        reference={"answer": "16"},
        num_completions=1,
        sampling=Sampling(temperature=1.0, max_new_tokens=32, stop_token_ids=[1]),
        min_weight_version=0,
    )
    assert cast(RewardTask, load_task("arithmetic", {})).reward(completion, ticket) == reward
