"""reasoning-gym: more than a hundred procedural data sets with verifiable answers, by name and settings.

Owns the prompts and their split; questions, answers and scores are the package's own. A ticket carries the entry's seed
and index instead of the entry, because some entries do not survive JSON (tuples become lists). The package is imported
when the task is constructed.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from headrace.common.tasks import Prompt, Split
from headrace.common.wire import Message, Ticket

PACKAGE = "reasoning-gym==0.1.25"
INSTALL = f"pip install {PACKAGE} numpy python-dateutil"
"""The package's own metadata leave out the other two."""
MAX_REPEATS = 1000
"""This many questions in a row that are held out, or repeated, and the data set has no others."""
UNSTABLE = frozenset(
    {
        "acre",
        "isomorphic_strings",
        "knight_swap",
        "list_functions",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
"""Data sets whose entries also depend on the process that makes them: on the seed of Python's hashes, or on a global
random generator. `tests/common/test_reasoning_gym.py` finds them."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A data set of reasoning-gym with settings of its own; `weight` is its share of the prompts, in proportion."""

    name: str
    weight: float = 1.0
    settings: dict[str, Any] = {}


class ReasoningGym:
    """Questions of one or several data sets of reasoning-gym; the reward is the data set's score, from 0 to 1.

    `datasets`: a list of `{name, weight, settings}`. `size`: training prompts an epoch, before those that are held out
    are left out; each epoch has new ones. `held_out_size`: held-out prompts at most. `system_prompt`: the name of one
    of the package's prompts, a text, or null for none.
    """

    def __init__(
        self,
        datasets: list[dict[str, Any]],
        size: int = 10_000,
        held_out_size: int = 1_000,
        system_prompt: str | None = "default",
    ) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer
        except ImportError as error:
            raise ValueError(f"task 'reasoning_gym': {error}; expected, {INSTALL}") from error
        try:
            self._sources = msgspec.convert(datasets, list[Source])
        except msgspec.ValidationError as error:
            expected = "expected a list of {name, weight, settings}"
            raise ValueError(f"datasets {datasets!r}: {error}; {expected}") from error
        for name, number in (("size", size), ("held_out_size", held_out_size)):
            if number < 1:
                raise ValueError(f"{name} {number}: expected at least 1")
        if not self._sources or any(source.weight <= 0 for source in self._sources):
            raise ValueError(f"datasets {datasets!r}: expected at least one, each with a weight above 0")
        self._create = reasoning_gym.create_dataset
        self._extract = extract_answer
        self._sizes: dict[Split, int] = {"train": size, "held_out": held_out_size}
        self._system = None if system_prompt is None else SYSTEM_PROMPTS.get(system_prompt, system_prompt)
        self._opened = functools.lru_cache(maxsize=4 * len(self._sources))(self._open)
        self._entry = functools.lru_cache(maxsize=64)(lambda place, seed, index: self._opened(place, seed)[index])
        for place in range(len(self._sources)):
            self._check(place)

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        """`train` has new entries each epoch, none with a question that is held out.

        Raises `ValueError` if the settings leave too few different questions.
        """
        if split == "held_out":
            return iter(self._held_out(seed))
        held_out = {prompt.messages[-1]["content"] for prompt in self._held_out(seed)}
        return self._train(held_out, seed, epoch)

    def reward(self, completion: str, ticket: Ticket) -> float:
        """The data set's score of what stands in the last `<answer></answer>`; without one, its score of no answer.

        Raises `ValueError` if the ticket's question is not the entry's, because another version of the package made it.
        """
        place, seed, index = (ticket.reference[name] for name in ("dataset", "seed", "index"))
        entry = self._entry(place, seed, index)
        if entry["question"] != ticket.messages[-1]["content"]:
            name = self._sources[place].name
            raise ValueError(f"entry {index} of {name!r} has another question here; expected {PACKAGE} everywhere")
        return float(self._opened(place, seed).score_answer(self._extract(completion), entry))

    def _train(self, held_out: set[str], seed: int, epoch: int) -> Iterator[Prompt]:
        num_repeated = 0
        for prompt in self._drawn("train", seed, epoch):
            is_held_out = prompt.messages[-1]["content"] in held_out
            num_repeated = num_repeated + 1 if is_held_out else 0
            if num_repeated == MAX_REPEATS:
                raise ValueError(
                    f"the last {MAX_REPEATS} questions are all held out: expected settings of the data sets with more "
                    f"questions, or held_out_size below {len(held_out)}"
                )
            if not is_held_out:
                yield prompt

    @functools.cache  # noqa: B019 - of a task there is one in a process
    def _held_out(self, seed: int) -> list[Prompt]:
        """Different questions, at most `held_out_size`."""
        found: dict[str, Prompt] = {}
        num_repeated = 0
        for prompt in self._drawn("held_out", seed, 0):
            question = prompt.messages[-1]["content"]
            num_repeated = num_repeated + 1 if question in found else 0
            if num_repeated == MAX_REPEATS:
                break
            found.setdefault(question, prompt)
        return list(found.values())

    def _drawn(self, split: Split, seed: int, epoch: int) -> Iterator[Prompt]:
        """Entries of the data sets in proportion to their weights."""
        digest = hashlib.sha256(f"{split} {seed} {epoch}".encode()).digest()
        own_seed = int.from_bytes(digest[:4])
        weights = np.array([source.weight for source in self._sources])
        places = np.random.default_rng(own_seed).choice(len(weights), self._sizes[split], p=weights / weights.sum())
        counters = [itertools.count() for _ in self._sources]
        for place in map(int, places):
            index = next(counters[place])
            question = self._entry(place, own_seed, index)["question"]
            messages: list[Message] = [{"role": "user", "content": question}]
            if self._system is not None:
                messages.insert(0, {"role": "system", "content": self._system})
            yield Prompt(messages, {"dataset": place, "seed": own_seed, "index": index})

    def _open(self, place: int, seed: int, size: int | None = None) -> Any:
        """Data sets of all sizes have the same entries; by default it has as many as a split needs."""
        source = self._sources[place]
        try:
            return self._create(source.name, seed=seed, size=size or max(self._sizes.values()), **source.settings)
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"data set {source.name!r} of reasoning-gym with {source.settings}: {error}") from error

    def _check(self, place: int) -> None:
        """Raises `ValueError` unless an entry is the same when it is made again, and its own answer scores 1."""
        name = self._sources[place].name
        if name in UNSTABLE:
            raise ValueError(f"data set {name!r} of reasoning-gym is not the same in each process; expected another")
        data_set, again = self._open(place, seed=0, size=1), self._open(place, seed=0, size=1)[0]
        if (data_set[0]["question"], data_set[0]["answer"]) != (again["question"], again["answer"]):
            raise ValueError(f"data set {name!r} of reasoning-gym is not the same each time; expected another")
        if again["answer"] is not None and (score := data_set.score_answer(again["answer"], again)) != 1.0:
            raise ValueError(f"data set {name!r} of reasoning-gym scores its own answer {score}, expected 1.0")
