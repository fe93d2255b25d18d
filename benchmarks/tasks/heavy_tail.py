"""A workload with completions of 20 to 512 tokens with a heavy tail, and a policy of 10.8 M parameters for it.

`python -m benchmarks.tasks.heavy_tail` makes the policy, in runs/heavy-tail-policy. A short question asks to subtract a
number repeatedly; the answer has one line per subtraction, counting down. The number of repetitions is
Pareto-distributed. The policy is the demo's, finetuned on answers of which most report the result one repetition too
early or too late (drawn_task.py), and then grown without changing its results (growth.py).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.tasks.drawn_task import DrawnTask, supervised_demo_policy, with_answers
from headrace.common.tasks import Prompt
from headrace.common.tasks.arithmetic import ANSWER_MARK, ITEMS, NAMES, is_held_out

POLICY = Path("runs/heavy-tail-policy")
FEWEST_TIMES, MOST_TIMES, TAIL_INDEX = 2, 37, 1.1
"""Bounds and tail index of the number of subtractions: P(more than n) is (FEWEST_TIMES / n) ** TAIL_INDEX, up to
MOST_TIMES."""
TAKEN, LEFT = range(3, 13), range(12, 50)
MAX_NEW_TOKENS = 512
NUM_STEPS, BATCH_TOKENS, POOL_SIZE, LEARNING_RATE, SLIP_SHARE = 900, 4096, 512, 1.5e-3, 0.65


@dataclass(frozen=True)
class Selling:
    times: int
    taken: int
    left: int
    name: str
    item: str

    @property
    def prompt(self) -> Prompt:
        story = f"{self.name} has {self.after(0)} {self.item} and sold {self.taken} {self.times} times."
        return Prompt([{"role": "user", "content": f"{story} How many now?"}], {"answer": str(self.left)})

    def after(self, times: int) -> int:
        return self.left + (self.times - times) * self.taken

    def worked(self, slip: int = 0) -> str:
        """The right answer; with `slip` the same arithmetic, but the final answer is that of `slip` repetitions
        later."""
        lines = [f"{self.times - n}:{self.after(n)} - {self.taken} = {self.after(n + 1)}" for n in range(self.times)]
        return "\n".join([*lines, f"{ANSWER_MARK} {self.after(self.times + slip)}"])

    @property
    def slips(self) -> list[str]:
        return [self.worked(-1), self.worked(1)]


class HeavyTail(DrawnTask[Selling]):
    name = "heavy"

    def draw(self, rng: random.Random, *, held_out: bool) -> Selling:
        while True:
            times = int(min(FEWEST_TIMES * rng.paretovariate(TAIL_INDEX), MOST_TIMES))
            taken, left = rng.choice(TAKEN), rng.choice(LEFT)
            if is_held_out("selling", (times, taken, left)) == held_out:
                return Selling(times, taken, left, rng.choice(NAMES), rng.choice(ITEMS))


def make_policy(folder: Path, num_steps: int = NUM_STEPS) -> None:
    """Deterministic on one machine; takes some minutes on one core."""
    from benchmarks.tasks.growth import grown
    from headrace.learner.demo_policy.make import save_policy

    model, tokenizer = supervised_demo_policy(_batches(), num_steps, LEARNING_RATE)
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    save_policy(folder, grown(model), tokenizer)


def _batches() -> Iterator[list[tuple[Prompt, str]]]:
    """Batches of answers of similar length, of at most `BATCH_TOKENS` tokens with padding; in random order."""
    rng, source = random.Random("batches"), with_answers(HeavyTail().problems("train", "warm start"), SLIP_SHARE)
    while True:
        pairs = sorted(islice(source, POOL_SIZE), key=lambda pair: len(pair[1]))
        batches: list[list[tuple[Prompt, str]]] = [[]]
        for problem, answer in pairs:
            if (len(batches[-1]) + 1) * (60 + len(answer) * 3 // 4) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append((problem.prompt, answer))
        rng.shuffle(batches)
        yield from batches


if __name__ == "__main__":
    make_policy(POLICY)
