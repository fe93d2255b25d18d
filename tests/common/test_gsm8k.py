"""GSM8K: every reference is right, no perturbation of one is, and bad input is named."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.common.tasks import BadRow, Prompt, load_task
from headrace.common.tasks.gsm8k import INSTRUCTION, Gsm8k
from headrace.common.wire import Sampling, Ticket

REPOSITORY = Path(__file__).parents[2]
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k"
NUM_TRAIN, NUM_TEST = 7473, 1319
ROWS = [{"question": f"What is {n} + 0?", "answer": f"It is {n}.\n#### {n:,}"} for n in range(990, 1010)]


def reward(completion: str, answer: str) -> float:
    ticket = Ticket(
        id="t",
        kind="train",
        prompt_tokens=[1],
        messages=[],
        reference={"answer": answer},
        num_completions=1,
        sampling=Sampling(temperature=1.0, max_new_tokens=8, stop_token_ids=[]),
        min_weight_version=0,
    )
    return Gsm8k().reward(completion, ticket)


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """The text of every answer of GSM8K."""
    if not GSM8K.is_dir():
        reason = f"no copy of GSM8K at {GSM8K.name!r} in ../shared/data of the repository"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    lines = [line for name in ("train", "test") for line in (GSM8K / f"{name}.jsonl").read_text().splitlines()]
    return [json.loads(line)["answer"] for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "rows" / "train.jsonl", ROWS[:16])
    write_jsonl(tmp_path / "rows" / "test.jsonl", ROWS[16:])
    return tmp_path / "rows"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def references(task: Gsm8k, split: Any = "train", *, seed: int = 0, epoch: int = 0) -> list[str]:
    prompts = list(task.prompts(split, seed=seed, epoch=epoch))
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    return [prompt.reference["answer"] for prompt in prompts if isinstance(prompt, Prompt)]


def reference_of(answer: str) -> str:
    return answer.partition("#### ")[2].replace(",", "")


def test_every_reference_answer_of_the_data_set_is_right(answers: list[str]) -> None:
    assert len(answers) == NUM_TRAIN + NUM_TEST
    wrong = [answer for answer in answers if reward(answer, reference_of(answer)) != 1.0]
    assert wrong == []


PERTURBATIONS: dict[str, Callable[[str], str]] = {
    "plus one": lambda number: str(Decimal(number) + 1),
    "times ten": lambda number: str(Decimal(number) * 10),
    "negated": lambda number: str(-Decimal(number)),
    "last digit dropped": lambda number: number[:-1],
    "first digit dropped": lambda number: number[1:],
    "digit doubled": lambda number: number + number[-1],
    "a tenth": lambda number: str(Decimal(number) / 10),
    "empty": lambda number: "",
    "no number": lambda number: "unknown",
    "all guesses": lambda number: f"{number} or {Decimal(number) + 1}",
    "list": lambda number: f"{Decimal(number) - 1}, {number}",
}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_no_perturbed_answer_of_the_data_set_is_right(answers: list[str], perturbation: str) -> None:
    rewarded = []
    for answer in answers:
        reasoning, _, number = answer.partition("#### ")
        number = number.replace(",", "")
        perturbed = PERTURBATIONS[perturbation](number)
        if reward(f"{reasoning}#### {perturbed}", number) != 0.0:
            rewarded.append(number)
    # One reference is 0, and stays 0 here.
    still_right = ["0"] if perturbation in ("times ten", "negated", "digit doubled", "a tenth") else []
    assert rewarded == still_right


def test_an_unmarked_answer_earns_nothing(answers: list[str]) -> None:
    assert sum(reward(answer.replace("#### ", ""), reference_of(answer)) for answer in answers) == 0.0


@given(
    number=st.decimals(min_value=-(10**9), max_value=10**9, places=2),
    reasoning=st.text(max_size=50).filter(lambda text: "#" not in text and "\\" not in text),
    form=st.sampled_from(
        ["#### {}", "#### ${}", "#### {}.", "#### {} apples", "####{}\n", "#### **{}**", "\\boxed{{{}}}", "#### x = {}"]
    ),
    number_form=st.sampled_from(["{:,}", "{}", "{:.4f}"]),
)
@settings(max_examples=200)
def test_any_number_is_right_in_any_form_and_wrong_one_cent_off(
    number: Decimal, reasoning: str, form: str, number_form: str
) -> None:
    completion = reasoning + form.format(number_form.format(number))
    assert reward(completion, str(number)) == 1.0
    assert reward(completion, str(number + Decimal("0.01"))) == 0.0


@given(st.text(alphabet="#\\boxed{} -.,/0123456789$%=+*frac\n", max_size=200))
@settings(max_examples=200)
def test_any_text_has_a_reward(completion: str) -> None:
    assert reward(completion, "5") in (0.0, 1.0)


def test_prompts_of_the_data_set(answers: list[str]) -> None:
    task = Gsm8k(path=str(GSM8K))
    assert references(task, "held_out") == [reference_of(answer) for answer in answers[NUM_TRAIN:]]
    assert sorted(references(task)) == sorted(reference_of(answer) for answer in answers[:NUM_TRAIN])


def test_a_prompt_is_the_question_and_the_instruction(folder: Path) -> None:
    [first, *_] = load_task("gsm8k", {"path": str(folder)}).prompts("held_out", seed=0, epoch=0)
    assert isinstance(first, Prompt)
    assert first.messages == [{"role": "user", "content": f"What is 1006 + 0?\n\n{INSTRUCTION}"}]
    assert first.reference == {"answer": "1006"}


def test_train_is_shuffled_by_seed_and_epoch_and_held_out_is_not(folder: Path) -> None:
    task = Gsm8k(path=str(folder))
    order = references(task, seed=3, epoch=1)
    assert order == references(Gsm8k(path=str(folder)), seed=3, epoch=1)
    assert (
        sorted(order)
        == sorted(references(task, seed=3, epoch=2))
        == [str(n) for n in [*range(1000, 1006), *range(990, 1000)]]
    )
    assert len({tuple(references(task, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert references(task, "held_out", seed=3, epoch=1) == ["1006", "1007", "1008", "1009"]


def test_the_order_is_the_same_on_every_machine(folder: Path) -> None:
    assert references(Gsm8k(path=str(folder)), seed=3, epoch=1)[:4] == ["992", "1004", "994", "999"]


def test_parquet_and_single_files(tmp_path: Path) -> None:
    Dataset.from_list(ROWS[:16]).to_parquet(tmp_path / "rows" / "train.parquet")
    Dataset.from_list(ROWS[16:]).to_parquet(tmp_path / "rows" / "test.parquet")
    assert len(references(Gsm8k(path=str(tmp_path / "rows")))) == 16
    write_jsonl(tmp_path / "all.jsonl", ROWS)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "all.parquet")
    for name in ("all.jsonl", "all.parquet"):
        task = Gsm8k(path=str(tmp_path / name), train_split="train[:75%]", held_out_split="train[75%:]")
        assert references(task, "held_out") == ["1005", "1006", "1007", "1008", "1009"]
        assert len(references(task)) == 15


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "expected at least one row"),
        ('{"question": "q", "solution": "#### 1"}\n', "expected the text columns 'question' and 'answer'.*solution"),
        ('{"question": "q", "answer": 1}\n', "expected the text columns"),
        ('{"question": null, "answer": "#### 1"}\n{"question": "q", "answer": "1"}\n', "row 0: expected two texts"),
        ('{"question": "q", "answer": "It is 1"}\n', "row 0: expected an answer that ends in '#### <number>'.*It is 1"),
        ('{"question": "q", "answer": "#### one"}\n', "row 0: expected an answer that ends in '#### <number>'.*one"),
        ("{not JSON\n", "cannot load the split 'train'"),
    ],
)
def test_bad_rows_are_named_before_the_first_prompt(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{problem}"):
            Gsm8k(path=str(place)).prompts("train", seed=0, epoch=0)


def test_a_bad_row_among_good_ones_is_passed_at_its_place(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*ROWS[:3], {"question": None, "answer": "#### 1"}, *ROWS[3:5]]
    write_jsonl(tmp_path / "train.jsonl", rows)
    task = Gsm8k(path=str(tmp_path), train_split="train[:1%]", held_out_split="train")
    prompts = list(task.prompts("held_out", seed=0, epoch=0))
    assert [isinstance(prompt, BadRow) for prompt in prompts] == [False, False, False, True, False, False]
    assert isinstance(prompts[3], BadRow) and "row 3: expected two texts, found question None" in prompts[3].reason


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_every_type_of_text_that_parquet_may_have_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    """Polars and pandas 3 write the two later ones."""
    table = pa.table({name: pa.array([row[name] for row in ROWS], kind) for name in ("question", "answer")})
    pq.write_table(table, tmp_path / "train.parquet")
    assert pq.read_schema(tmp_path / "train.parquet").field("answer").type == kind
    assert sorted(references(Gsm8k(path=str(tmp_path)))) == sorted(reference_of(row["answer"]) for row in ROWS)


def test_bad_places_are_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("question,answer\n")
    for name, problem in {
        "nowhere": "expected a hub name, a folder",
        "empty": "cannot load",
        "rows.csv": ".jsonl",
    }.items():
        with pytest.raises(ValueError, match=f"(?s){tmp_path / name}.*{problem}"):
            Gsm8k(path=str(tmp_path / name)).prompts("train", seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"'validation'.*train"):
        Gsm8k(path=str(folder), held_out_split="validation").prompts("held_out", seed=0, epoch=0)
    with pytest.raises(ValueError, match="both 'train'"):
        Gsm8k(held_out_split="train")


def test_importing_the_task_is_cheap() -> None:
    program = "import sys, headrace.common.tasks.gsm8k; print({'datasets', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
