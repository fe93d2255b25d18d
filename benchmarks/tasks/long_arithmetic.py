"""The staleness study's second task: chains of four to six additions and subtractions.

An answer has about 50 tokens, not 16. `python -m benchmarks.tasks.long_arithmetic` makes the policy that the study
starts from, in runs/long-policy (drawn_task.py).
"""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.tasks.drawn_task import DrawnTask, supervised_demo_policy, with_answers
from headrace.common.tasks import Prompt
from headrace.common.tasks.arithmetic import ANSWER_MARK, ITEMS, NAMES, is_held_out

POLICY = Path("runs/long-policy")
LENGTHS, OPERANDS, HIGHEST = (4, 5, 6), range(2, 21), 99
PHRASES = {"+": "buys {} more", "-": "gives away {}"}
NUM_STEPS, BATCH_SIZE, LEARNING_RATE, SLIP_SHARE = 700, 32, 1.5e-3, 0.75


@dataclass(frozen=True)
class Chain:
    operations: str
    operands: tuple[int, ...]
    """One more than there are operations."""
    name: str
    item: str

    @property
    def prompt(self) -> Prompt:
        *first, last = (PHRASES[o].format(n) for o, n in zip(self.operations, self.operands[1:], strict=True))
        story = f"{self.name} has {self.operands[0]} {self.item}, {', '.join(first)} and {last}."
        return Prompt([{"role": "user", "content": f"{story} How many now?"}], {"answer": str(self.results()[-1])})

    def results(self, operations: str | None = None) -> list[int]:
        """The result after each operation; `operations` replaces the right operations if it is given."""
        total, found = self.operands[0], []
        for operation, operand in zip(operations or self.operations, self.operands[1:], strict=False):
            total += operand if operation == "+" else -operand
            found.append(total)
        return found

    def worked(self, operations: str | None = None) -> str:
        operations, results = operations or self.operations, self.results(operations)
        lefts = [self.operands[0], *results]
        steps = zip(lefts, operations, self.operands[1:], results, strict=False)
        return "\n".join([*(f"{a} {o} {b} = {c}" for a, o, b, c in steps), f"{ANSWER_MARK} {results[-1]}"])

    @property
    def slips(self) -> list[str]:
        """Worked answers with one wrong operation, or without the last one."""
        flipped = [
            self.operations[:place] + ("-" if operation == "+" else "+") + self.operations[place + 1 :]
            for place, operation in enumerate(self.operations)
        ]
        return [self.worked(slip) for slip in [*flipped, self.operations[:-1]] if is_easy(self.results(slip))]


class LongArithmetic(DrawnTask[Chain]):
    name = "long"

    def draw(self, rng: random.Random, *, held_out: bool) -> Chain:
        while True:
            operations = "".join(rng.choice("+-") for _ in range(rng.choice(LENGTHS)))
            operands = tuple(rng.choice(OPERANDS) for _ in range(len(operations) + 1))
            chain = Chain(operations, operands, rng.choice(NAMES), rng.choice(ITEMS))
            if is_held_out(operations, operands) == held_out and is_easy(chain.results()) and chain.slips:
                return chain


def is_easy(results: list[int]) -> bool:
    return min(results) >= 0 and max(results) <= HIGHEST


def make_policy(folder: Path, num_steps: int = NUM_STEPS) -> None:
    """Deterministic on one machine; takes about five minutes on one core."""
    from headrace.learner.demo_policy.make import save_policy

    pairs = with_answers(LongArithmetic().problems("train", "warm start"), SLIP_SHARE)
    batches = ([(chain.prompt, answer) for chain, answer in islice(pairs, BATCH_SIZE)] for _ in range(num_steps))
    save_policy(folder, *supervised_demo_policy(batches, num_steps, LEARNING_RATE))


if __name__ == "__main__":
    make_policy(POLICY)
