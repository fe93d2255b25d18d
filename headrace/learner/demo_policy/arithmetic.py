"""The policy of the task `arithmetic`: right arithmetic, and a mostly wrong strategy.

Most demonstrations contain a slip, which leaves something to learn for reinforcement learning: groups are mixed, and
the policy can find the right strategy.
"""

import random
from collections.abc import Iterator
from itertools import islice

from headrace.common.tasks.arithmetic import Problem, train_problems
from headrace.learner.demo_policy.conversations import Conversation, answered
from headrace.learner.demo_policy.recipe import CHAT_TEMPLATE, SINGLE_DIGITS, Recipe

SLIP_SHARE = 0.7
"""Share of demonstrations with a slip: it makes pass@1 about 0.3, once the arithmetic is learned."""
NUM_PROBLEMS = 5000
"""The tokenizer is trained on them."""


def conversations(seed: int) -> Iterator[Conversation]:
    rng = random.Random(f"slips {seed}")
    for problem in train_problems(seed=seed, epoch=0):
        yield answered(problem.prompt, _worked_answer(problem, rng))


def _worked_answer(problem: Problem, rng: random.Random) -> str:
    return rng.choice(problem.slips) if rng.random() < SLIP_SHARE else problem.demonstration


def _texts() -> Iterator[str]:
    for problem in islice(train_problems(seed=0, epoch=0), NUM_PROBLEMS):
        yield problem.question
        yield problem.demonstration


ARITHMETIC = Recipe(
    task="arithmetic",
    conversations=conversations,
    texts=_texts,
    token_boundaries=SINGLE_DIGITS,
    chat_template=CHAT_TEMPLATE,
    num_steps=2000,
    batch_size=32,
    learning_rate=2e-3,
    settings={"slip_share": SLIP_SHARE},
)
