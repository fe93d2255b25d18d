"""The basis of the benchmarks' own tasks: problems drawn at random, and a policy trained on mostly mistaken answers.

The policy is the demo's, finetuned for a while on worked answers of which most contain a slip, as the demo's policy was
made (headrace/learner/demo_policy/make.py). Whether a problem is held out is decided by a hash of its numbers.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from headrace.common.tasks import Prompt, Split
from headrace.common.tasks.arithmetic import score
from headrace.common.wire import Ticket

EPOCH_SIZE, HELD_OUT_SIZE = 100_000, 4096


class Problem(Protocol):
    @property
    def prompt(self) -> Prompt: ...
    @property
    def slips(self) -> list[str]: ...
    def worked(self) -> str: ...


P = TypeVar("P", bound=Problem)


class DrawnTask(Generic[P]):
    name: ClassVar[str]

    def draw(self, rng: random.Random, *, held_out: bool) -> P:
        raise NotImplementedError

    def problems(self, split: Split, seed: str) -> Iterator[P]:
        is_train = split == "train"
        rng = random.Random(f"{self.name} train {seed}" if is_train else f"{self.name} held_out")
        for _ in range(EPOCH_SIZE if is_train else HELD_OUT_SIZE):
            yield self.draw(rng, held_out=not is_train)

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return (problem.prompt for problem in self.problems(split, f"{seed} {epoch}"))

    def reward(self, completion: str, ticket: Ticket) -> float:
        return score(completion, ticket.reference["answer"])


def with_answers(problems: Iterator[P], slip_share: float) -> Iterator[tuple[P, str]]:
    """Each problem with a worked answer; the share `slip_share` of these contains a slip."""
    rng = random.Random("slips")
    for problem in problems:
        yield problem, rng.choice(problem.slips) if rng.random() < slip_share else problem.worked()


def supervised_demo_policy(
    batches: Iterator[list[tuple[Prompt, str]]], num_steps: int, learning_rate: float
) -> tuple[Any, Any]:
    """The demo's policy (Qwen3ForCausalLM, float32) after `num_steps` of finetuning on one core, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headrace.learner.demo_policy.conversations import answered
    from headrace.learner.demo_policy.finetuning import finetune

    torch.set_num_threads(1)
    start = Path(__file__).parents[2] / "headrace" / "demo" / "policy"
    tokenizer, model = AutoTokenizer.from_pretrained(start), AutoModelForCausalLM.from_pretrained(start)
    conversations = ([answered(prompt, text) for prompt, text in batch] for batch in batches)
    for step, loss in enumerate(finetune(model, tokenizer, conversations, num_steps, learning_rate), start=1):
        if step % 50 == 0:
            print(f"step {step} of {num_steps}, loss {loss:.4f}", file=sys.stderr, flush=True)
    return model, tokenizer
