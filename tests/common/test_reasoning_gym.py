"""reasoning-gym as a task: prompts by seed and epoch, no held-out question in training, its own answers score 1."""

import collections
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from headrace.common.tasks import Prompt, load_task
from headrace.common.tasks.reasoning_gym import UNSTABLE, ReasoningGym
from headrace.common.wire import Ticket
from tests.support.factories import make_ticket

SUMS = {"name": "chain_sum", "settings": {"max_terms": 3}}
SOME = ("arc_1d", "basic_arithmetic", "caesar_cipher", "figlet_font", "knights_knaves", "n_queens", "zebra_puzzles")
"""Data sets whose entries have tuples, arrays of characters or answers in several lines."""

ENTRIES = """
import hashlib, json, pathlib, sys, warnings
warnings.simplefilter("ignore")
import reasoning_gym
found = {}
for name in json.loads(sys.argv[1]):
    data_set = reasoning_gym.create_dataset(name, seed=5, size=10)
    entries = [data_set[index] for index in range(3)]
    found[name] = hashlib.sha256(repr(entries).encode()).hexdigest()
pathlib.Path(sys.argv[2]).write_text(json.dumps(found))
"""


def task_of(*datasets: dict[str, Any], **settings: Any) -> ReasoningGym:
    task = load_task("reasoning_gym", {"datasets": list(datasets), **settings})
    assert isinstance(task, ReasoningGym)
    return task


def questions(prompts: Any) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts]


def ticket_of(prompt: Prompt) -> Ticket:
    """As a replica decodes it: the reference has been through JSON."""
    return make_ticket(messages=prompt.messages, reference=json.loads(json.dumps(prompt.reference)))


def answer_of(task: Any, prompt: Prompt) -> str:
    reference = prompt.reference
    answer: str = task._entry(reference["dataset"], reference["seed"], reference["index"])["answer"]
    return answer


def test_the_same_arguments_give_the_same_prompts_and_each_epoch_has_others() -> None:
    first, again = (list(task_of(SUMS, size=50).prompts("train", seed=1, epoch=2)) for _ in range(2))
    other = questions(task_of(SUMS, size=50).prompts("train", seed=1, epoch=3))
    assert first == again and len(first) > 40
    assert len(set(questions(first)) & set(other)) < 5
    held_out = [list(task_of(SUMS, size=50).prompts("held_out", seed=1, epoch=epoch)) for epoch in (0, 7)]
    assert held_out[0] == held_out[1]


def test_no_training_question_is_held_out_even_where_questions_repeat() -> None:
    small = {"name": "chain_sum", "settings": {"max_terms": 2, "min_digits": 1, "max_digits": 1}}
    task = task_of(small, size=400, held_out_size=30)
    held_out = questions(task.prompts("held_out", seed=0, epoch=0))
    train = questions(itertools.chain(*(task.prompts("train", seed=0, epoch=epoch) for epoch in range(3))))
    assert len(held_out) == len(set(held_out)) > 20 and len(train) > 600
    assert not set(held_out) & set(train)


def test_a_data_set_whose_questions_are_all_held_out_is_refused() -> None:
    few = {"name": "coin_flip", "settings": {"min_trials": 3, "max_trials": 3}}
    task = task_of(few, size=5000, held_out_size=5000)
    with pytest.raises(ValueError, match=r"the last 1000 questions are all held out: .* held_out_size below \d+"):
        list(task.prompts("train", seed=0, epoch=0))


def test_weights_are_shares_of_the_prompts() -> None:
    task = task_of(SUMS | {"weight": 3}, {"name": "spell_backward"}, size=2000, held_out_size=100)
    shares = collections.Counter(prompt.reference["dataset"] for prompt in task.prompts("train", seed=0, epoch=0))
    assert shares[0] / shares.total() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("name", SOME)
def test_its_own_answer_scores_1_and_another_less(name: str) -> None:
    task = task_of({"name": name}, size=5, held_out_size=5)
    for prompt in task.prompts("held_out", seed=0, epoch=0):
        answer = answer_of(task, prompt)
        assert task.reward(f"So, <answer>{answer}</answer>", ticket_of(prompt)) == 1.0
        assert task.reward(f"So it is {answer}", ticket_of(prompt)) < 0.1, "an answer stands in its tags"
        assert task.reward("<answer>certainly not</answer>", ticket_of(prompt)) < 0.5


def test_the_system_prompt_is_a_name_a_text_or_none() -> None:
    def first(system_prompt: str | None) -> list[dict[str, str]]:
        return next(iter(task_of(SUMS, system_prompt=system_prompt).prompts("train", seed=0, epoch=0))).messages

    assert "<answer>" in first("default")[0]["content"] and first("default")[0]["role"] == "system"
    assert first("Be brief.")[0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in first(None)] == ["user"]


def test_an_entry_that_is_another_one_here_is_named() -> None:
    """The replica has another version of the package than the learner."""
    task = task_of(SUMS)
    ticket = make_ticket(
        messages=[{"role": "user", "content": "1 + 1?"}], reference={"dataset": 0, "seed": 1, "index": 0}
    )
    with pytest.raises(ValueError, match="entry 0 of 'chain_sum' has another question here; expected reasoning-gym=="):
        task.reward("", ticket)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"datasets": []}, "expected at least one, each with a weight above 0"),
        ({"datasets": [SUMS | {"weight": 0}]}, "expected at least one, each with a weight above 0"),
        ({"datasets": [{"nam": "chain_sum"}]}, "expected a list of {name, weight, settings}"),
        ({"datasets": [{"name": "chain_sums"}]}, "data set 'chain_sums' of reasoning-gym"),
        ({"datasets": [{"name": "chain_sum", "settings": {"max_term": 3}}]}, "data set 'chain_sum' of reasoning-gym"),
        ({"datasets": [{"name": "composite"}]}, "data set 'composite' of reasoning-gym"),
        ({"datasets": [{"name": "acre"}]}, "data set 'acre' of reasoning-gym is not the same in each process"),
        ({"datasets": [SUMS], "size": 0}, "size 0: expected at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_task("reasoning_gym", settings)
    assert text in str(raised.value) and "\n" not in str(raised.value)


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"expected, pip install reasoning-gym==0\.1\.25 numpy python-dateutil"):
        task_of(SUMS)


@pytest.mark.slow
def test_the_data_sets_that_differ_between_processes_are_those_that_are_refused(tmp_path: Path) -> None:
    """All of them but `composite`, which needs other data sets, under two seeds of Python's hashes."""
    from reasoning_gym.factory import DATASETS

    names = json.dumps(sorted(DATASETS.keys() - {"composite", "acre"}))
    files = [tmp_path / "1", tmp_path / "2"]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", ENTRIES, names, file], env=os.environ | {"PYTHONHASHSEED": file.name}, stdout=2
        )
        for file in files
    ]
    assert [child.wait() for child in children] == [0, 0]
    first, second = (json.loads(file.read_text()) for file in files)
    differing = {name for name in first if first[name] != second[name]}
    assert differing <= UNSTABLE, differing - UNSTABLE
    for name in sorted(set(first) - UNSTABLE):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task_of({"name": name}, size=2, held_out_size=2)
