"""A workload whose completions are of 20 to 512 tokens with a heavy tail, and a policy of 10.8 M parameters for it.

`python -m benchmarks.heavy_tail` makes the policy, in runs/heavy-tail-policy. A problem takes a number away again and
again until fewer than a limit are left, a line for each time; how often is Pareto-distributed, from a short question.
The policy is the demo's, supervised for a while on worked answers of which most stop once too early or too late, as in
its own warm start (services/learner/warm_start.py), and then grown without changing what it computes (growth.py).
A problem is held out by a hash of its numbers.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.tasks import Prompt, Split
from common.tasks.arithmetic import ANSWER_MARK, ITEMS, NAMES, is_held_out, score
from common.wire import Ticket

POLICY = Path("runs/heavy-tail-policy")
EPOCH_SIZE, HELD_OUT_SIZE = 100_000, 4096
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


class HeavyTail:
    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return (problem.prompt for problem in problems(split, f"{seed} {epoch}"))

    def reward(self, completion: str, ticket: Ticket) -> float:
        return score(completion, ticket.reference["answer"])


def problems(split: Split, seed: str) -> Iterator[Sharing]:
    is_train = split == "train"
    rng = random.Random(f"heavy train {seed}" if is_train else "heavy held_out")
    for _ in range(EPOCH_SIZE if is_train else HELD_OUT_SIZE):
        yield _draw(rng, held_out=not is_train)


def _draw(rng: random.Random, *, held_out: bool) -> Sharing:
    while True:
        times = int(min(FEWEST_TIMES * rng.paretovariate(TAIL_INDEX), MOST_TIMES))
        taken, limit = rng.choice(TAKEN), rng.choice(LIMITS)
        start = limit - 1 - rng.randrange(taken) + times * taken
        if is_held_out("sharing", (start, taken, limit)) == held_out and start - times * taken >= 0:
            return Sharing(start, taken, limit, rng.choice(NAMES), rng.choice(ITEMS))


def make_policy(folder: Path, num_steps: int = NUM_STEPS) -> None:
    """Deterministic on one machine; some minutes of one core."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.growth import grown
    from services.learner.warm_start import ADAM_BETAS, MAX_GRADIENT_NORM, completion_loss, encode, save_policy

    torch.set_num_threads(1)
    start = Path(__file__).parents[1] / "assets" / "demo-policy"
    tokenizer, model = AutoTokenizer.from_pretrained(start), AutoModelForCausalLM.from_pretrained(start)
    tokenizer.padding_side = "right"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS, weight_decay=0.0)
    batches = _batches()
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / num_steps)
        loss = completion_loss(model, *encode(tokenizer, next(batches)))  # type: ignore[arg-type]  # has a prompt too
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {num_steps}, loss {loss.item():.4f}", file=sys.stderr, flush=True)
    tokenizer.padding_side = "left"
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    save_policy(folder, grown(model), tokenizer)


def _batches() -> Iterator[list[tuple[Sharing, str]]]:
    """Of answers of about one length, in at most so many tokens with padding; in random order."""
    rng, source = random.Random("slips"), problems("train", "warm start")
    while True:
        pool = [next(source) for _ in range(POOL_SIZE)]
        pairs = [(one, rng.choice(one.slips) if rng.random() < SLIP_SHARE else one.worked()) for one in pool]
        pairs.sort(key=lambda pair: len(pair[1]))
        batches: list[list[tuple[Sharing, str]]] = [[]]
        for pair in pairs:
            if (len(batches[-1]) + 1) * (60 + len(pair[1]) * 3 // 4) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(pair)
        rng.shuffle(batches)
        yield from batches


if __name__ == "__main__":
    make_policy(POLICY)
