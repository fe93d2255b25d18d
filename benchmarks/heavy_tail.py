"""A workload whose completions are of 20 to 512 tokens with a heavy tail, and a policy of 10.8 M parameters for it.

`python -m benchmarks.heavy_tail` makes the policy, in runs/heavy-tail-policy. A problem takes a number away again and
again until fewer than a limit are left, a line for each time; how often is Pareto-distributed, from a short question.
The policy is the demo's, supervised on answers of which most stop once too early or too late (drawn_task.py), and then
grown without changing what it computes (growth.py).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.drawn_task import DrawnTask, answered, supervised_demo_policy
from common.tasks import Prompt
from common.tasks.arithmetic import ANSWER_MARK, ITEMS, NAMES, is_held_out

POLICY = Path("runs/heavy-tail-policy")
FEWEST_TIMES, MOST_TIMES, TAIL_INDEX = 3, 46, 1.2
"""How often something is taken away: P(more than n) is (FEWEST_TIMES / n) ** TAIL_INDEX, up to the most."""
TAKEN, LIMITS = range(3, 13), range(10, 40)
MAX_NEW_TOKENS = 512
NUM_STEPS, BATCH_TOKENS, POOL_SIZE, LEARNING_RATE, SLIP_SHARE = 900, 4096, 512, 1.5e-3, 0.65


@dataclass(frozen=True)
class Sharing:
    start: int
    taken: int
    limit: int
    name: str
    item: str

    @property
    def times(self) -> int:
        """Until fewer than `limit` are left."""
        return (self.start - self.limit) // self.taken + 1

    @property
    def prompt(self) -> Prompt:
        story = f"{self.name} has {self.start} {self.item} and sold {self.taken} and {self.taken} more"
        question = f"{story} and so on. How many are left, fewer than {self.limit}?"
        return Prompt([{"role": "user", "content": question}], {"answer": str(self.after(self.times))})

    def after(self, times: int) -> int:
        return self.start - times * self.taken

    def worked(self, times: int | None = None) -> str:
        """The right answer; or that of somebody who stops after so many times."""
        times = self.times if times is None else times
        lines = [f"{self.after(n)} - {self.taken} = {self.after(n + 1)}" for n in range(times)]
        return "\n".join([*lines, f"{ANSWER_MARK} {self.after(times)}"])

    @property
    def slips(self) -> list[str]:
        """Right arithmetic, stopped once too early or too late."""
        return [self.worked(times) for times in (self.times - 1, self.times + 1) if self.after(times) >= 0]


class HeavyTail(DrawnTask[Sharing]):
    name = "heavy"

    def draw(self, rng: random.Random, *, held_out: bool) -> Sharing:
        while True:
            times = int(min(FEWEST_TIMES * rng.paretovariate(TAIL_INDEX), MOST_TIMES))
            taken, limit = rng.choice(TAKEN), rng.choice(LIMITS)
            start = limit - 1 - rng.randrange(taken) + times * taken
            if is_held_out("sharing", (start, taken, limit)) == held_out and start - times * taken >= 0:
                return Sharing(start, taken, limit, rng.choice(NAMES), rng.choice(ITEMS))


def make_policy(folder: Path, num_steps: int = NUM_STEPS) -> None:
    """Deterministic on one machine; some minutes of one core."""
    from benchmarks.growth import grown
    from services.learner.warm_start import save_policy

    model, tokenizer = supervised_demo_policy(_batches(), num_steps, LEARNING_RATE)
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    save_policy(folder, grown(model), tokenizer)


def _batches() -> Iterator[list[tuple[Prompt, str]]]:
    """Of answers of about one length, in at most so many tokens with padding; in random order."""
    rng, source = random.Random("batches"), answered(HeavyTail().problems("train", "warm start"), SLIP_SHARE)
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
