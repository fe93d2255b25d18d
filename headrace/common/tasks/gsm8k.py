"""GSM8K: grade-school word problems with one number for an answer, and data of the same two columns.

Owns the prompts (from the Hugging Face hub, or a local folder or file of JSONL or Parquet) and the reward: a completion
is right if its final answer (`headrace.common.tasks.answers`) equals the reference exactly. Importing this module does
not load `datasets`, so reward workers start fast.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from headrace.common.tasks import BadRow, Prompt, Split
from headrace.common.tasks.answers import DIGITS, final_answer
from headrace.common.wire import Ticket

INSTRUCTION = "Reason step by step, then end with the final answer on a line of its own: #### <number>"

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
NUMBER = re.compile(rf"-? *{DIGITS}", re.ASCII)


class Gsm8k:
    """Word problems; the reward is 1 for the right number and 0 otherwise.

    `path` is a hub name, a folder with a file per split (`train.jsonl`, `test.parquet`, ...), or one file, whose
    rows are then all in the split `train`. A split may be a slice: `train[:90%]`. `config` is for the hub only.
    """

    def __init__(
        self,
        path: str = "openai/gsm8k",
        config: str = "main",
        train_split: str = "train",
        held_out_split: str = "test",
        instruction: str = INSTRUCTION,
    ) -> None:
        if train_split == held_out_split:
            raise ValueError(f"train_split and held_out_split are both {train_split!r}, expected different rows")
        self._path = path
        self._config = config
        self._split_names: dict[Split, str] = {"train": train_split, "held_out": held_out_split}
        self._instruction = instruction

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt | BadRow]:
        """`train` shuffled by (seed, epoch); `held_out` in file order.

        Raises `ValueError`, before the first prompt, if the rows are missing, or none is of GSM8K's form.
        """
        name = self._split_names[split]
        rows = load_rows(self._path, self._config, name)
        prompts = [self._prompt(row, f"{self._path!r}, {name!r}, row {index}") for index, row in enumerate(rows)]
        bad = [prompt for prompt in prompts if isinstance(prompt, BadRow)]
        if len(bad) == len(prompts):
            raise ValueError(f"no row makes a prompt; {bad[0].reason}")
        if split == "held_out":
            return iter(prompts)
        order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
        return (prompts[index] for index in order)

    def _prompt(self, row: dict[str, Any], origin: str) -> Prompt | BadRow:
        question, answer = row["question"], row["answer"]
        if question is None or answer is None:
            return BadRow(f"{origin}: expected two texts, found question {question!r} and answer {answer!r}")
        _, hashes, number = answer.rpartition("####")
        reference = number.strip().replace(",", "")
        if not hashes or not NUMBER.fullmatch(reference):
            return BadRow(f"{origin}: expected an answer that ends in '#### <number>', found {answer[-80:]!r}")
        content = f"{question}\n\n{self._instruction}"
        return Prompt(messages=[{"role": "user", "content": content}], reference={"answer": reference})

    def reward(self, completion: str, ticket: Ticket) -> float:
        """1.0 if the completion's marked answer equals the reference, else 0.0.

        The answer is the text after the last `####`, or in the last `\\boxed{}`, that gives one (`final_answer`).
        Without such a mark the reward is 0, because the last number of the text would also reward a truncated chain of
        thought, or one that mentions the right number by chance. The number comes first: `$1,000.`, `5 dollars`, `50%`
        and `The answer is 5` are 1000, 5, 50 and 5; of an equation the right-hand side is read. Several numbers are
        arithmetic (`1/2`, `3 \\times 4`) or no answer at all, so listing guesses earns nothing.
        """
        return float(final_answer(completion) == Fraction(ticket.reference["answer"].replace(" ", "")))


def load_rows(path: str, config: str, split: str) -> list[dict[str, Any]]:
    """The rows of one split, at least one. Raises `ValueError` if there are none by these names.

    A hub that cannot be reached raises what `datasets` raises after its own retries: a `ConnectionError`.
    """
    import datasets  # takes 2 s, only for callers of `prompts`

    local = Path(path)
    if local.is_file() and local.suffix in FILE_FORMATS:
        where: dict[str, Any] = {"path": FILE_FORMATS[local.suffix], "data_files": {"train": path}}
    elif local.is_dir():
        where = {"path": path}
    elif not local.exists() and HUB_NAME.fullmatch(path):
        where = {"path": path, "name": config}
    else:
        raise ValueError(f"path {path!r}: expected a hub name, a folder, or a file ending in {sorted(FILE_FORMATS)}")
    try:
        rows = datasets.load_dataset(**where, split=split)
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"path {path!r}: cannot load the split {split!r}: {error}") from error
    except StopIteration as error:  # `datasets` raises it if every file is empty
        raise ValueError(f"path {path!r}, split {split!r}: expected at least one row, found none") from error
    if len(rows) == 0:
        raise ValueError(f"path {path!r}, split {split!r}: expected at least one row, found none")
    texts = {field.name for field in rows.features.arrow_schema if _is_text(field.type)}
    if not {"question", "answer"} <= texts:
        raise ValueError(f"path {path!r}: expected the text columns 'question' and 'answer', found {rows.features}")
    return list(rows)


def _is_text(kind: Any) -> bool:
    """Whether it is one of Arrow's three types of text; pandas 3 and Polars write the two later ones."""
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
