"""The study's second task: chains of four to six additions and subtractions, answered in about 50 tokens, not 16.

`python -m benchmarks.long_arithmetic` makes the policy that it starts from, in runs/long-policy: the demo's, supervised
for a while on worked answers of which most contain a slip, as in its own warm start (services/learner/warm_start.py).
A chain is held out by a hash of its operations and operands.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.tasks import Prompt, Split
from common.tasks.arithmetic import ANSWER_MARK, ITEMS, NAMES, is_held_out, score
from common.wire import Ticket

POLICY = Path("runs/long-policy")
LENGTHS, OPERANDS, HIGHEST = (4, 5, 6), range(2, 21), 99
EPOCH_SIZE, HELD_OUT_SIZE = 100_000, 4096
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
        """After each operation; by other operations than the right ones where they are given."""
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
        """Worked answers with one operation mistaken, or one left out at the end."""
        flipped = [
            self.operations[:place] + ("-" if operation == "+" else "+") + self.operations[place + 1 :]
            for place, operation in enumerate(self.operations)
        ]
        return [self.worked(slip) for slip in [*flipped, self.operations[:-1]] if is_easy(self.results(slip))]


class LongArithmetic:
    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return (chain.prompt for chain in chains(split, f"{seed} {epoch}"))

    def reward(self, completion: str, ticket: Ticket) -> float:
        return score(completion, ticket.reference["answer"])


def chains(split: Split, seed: str) -> Iterator[Chain]:
    is_train = split == "train"
    rng = random.Random(f"long train {seed}" if is_train else "long held_out")
    for _ in range(EPOCH_SIZE if is_train else HELD_OUT_SIZE):
        yield _draw(rng, held_out=not is_train)


def _draw(rng: random.Random, *, held_out: bool) -> Chain:
    while True:
        operations = "".join(rng.choice("+-") for _ in range(rng.choice(LENGTHS)))
        operands = tuple(rng.choice(OPERANDS) for _ in range(len(operations) + 1))
        chain = Chain(operations, operands, rng.choice(NAMES), rng.choice(ITEMS))
        if is_held_out(operations, operands) == held_out and is_easy(chain.results()) and chain.slips:
            return chain


def is_easy(results: list[int]) -> bool:
    return min(results) >= 0 and max(results) <= HIGHEST


def make_policy(folder: Path, num_steps: int = NUM_STEPS) -> None:
    """Deterministic on one machine; about five minutes of one core."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from services.learner.warm_start import ADAM_BETAS, MAX_GRADIENT_NORM, completion_loss, encode, save_policy

    torch.set_num_threads(1)
    start = Path(__file__).parents[1] / "assets" / "demo-policy"
    tokenizer, model = AutoTokenizer.from_pretrained(start), AutoModelForCausalLM.from_pretrained(start)
    tokenizer.padding_side = "right"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=ADAM_BETAS, weight_decay=0.0)
    rng, source = random.Random("slips"), chains("train", "warm start")
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / num_steps)
        batch = [next(source) for _ in range(BATCH_SIZE)]
        answers = [rng.choice(chain.slips) if rng.random() < SLIP_SHARE else chain.worked() for chain in batch]
        pairs = list(zip(batch, answers, strict=True))
        loss = completion_loss(model, *encode(tokenizer, pairs))  # type: ignore[arg-type]  # a chain has a prompt too
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {num_steps}, loss {loss.item():.4f}", file=sys.stderr, flush=True)
    tokenizer.padding_side = "left"
    save_policy(folder, model, tokenizer)


if __name__ == "__main__":
    make_policy(POLICY)
