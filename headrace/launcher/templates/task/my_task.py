"""A task of your own: where the prompts come from, and how a completion is rewarded."""

import random
import re
from collections.abc import Iterator

from headrace.common.tasks import Prompt, Split
from headrace.common.wire import Ticket

NAMES = ("Ada", "Ben", "Chen", "Dana")


class MyTask:
    def __init__(self, largest: int = 20) -> None:
        """The arguments come from `task.settings` in the recipe."""
        self.largest = largest

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        """Yields one epoch of prompts: in the same order for the same arguments, and no prompt in both splits."""
        pairs = [(a, b) for a in range(2, self.largest) for b in range(2, self.largest)]
        chosen = [(a, b) for a, b in pairs if ((a + b) % 5 == 0) == (split == "held_out")]
        rng = random.Random(f"{seed} {split} {epoch if split == 'train' else 0}")
        rng.shuffle(chosen)
        for a, b in chosen:
            question = f"{rng.choice(NAMES)} has {a} apples and gets {b} more. How many now?"
            yield Prompt(messages=[{"role": "user", "content": question}], reference={"answer": a + b})

    def reward(self, completion: str, ticket: Ticket) -> float:
        """Returns a finite number: 1 if the last number of the completion is the right one, else 0."""
        numbers = re.findall(r"\d+", completion)
        return float(bool(numbers) and int(numbers[-1]) == ticket.reference["answer"])
