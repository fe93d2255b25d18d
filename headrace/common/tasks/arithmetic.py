"""The demo's task: grade-school word problems of one or two steps, answered the way GSM8K is.

Owns the problems, their worked answers and their reward. A hash of a problem's template and operands decides whether
it is held out, so no held-out problem is ever trained on, whatever its names and objects. Every problem also has slips:
worked answers with a wrong strategy (a wrong operation, or stopping one step early) and right arithmetic. The demo
policy's supervised training includes them, so that reinforcement learning has something to correct.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from headrace.common.tasks import Prompt, Split
from headrace.common.wire import Ticket

EPOCH_SIZE = 100_000
HELD_OUT_SIZE = 4096
HELD_OUT_SHARE = 1 / 8

OPERANDS = range(2, 21)
MAX_PRODUCT = 100
ANSWER_MARK = "####"
MISTAKEN_FOR = {"+": "-*", "-": "+*", "*": "+-"}
"""The two operations that a slip may use instead of the right one. With two, no single slip is more likely than the
right answer; otherwise reinforcement learning would rarely find the right answer again."""

TEMPLATES = {
    "++": "{name} finds {a} {item}, {b} more and then {c} more. How many in all?",
    "+-": "{name} has {a} {item}, buys {b} more and gives away {c}. How many are left?",
    "--": "{name} had {a} {item}, lost {b} and sold {c}. How many remain?",
    "*+": "{name} has {a} boxes of {b} {item} and {c} loose ones. How many in all?",
    "*-": "{name} opens {a} bags of {b} {item} and uses {c}. How many are left?",
    "+*": "{name} packs {a} red and {b} blue bags of {c} {item}. How many {item} is that?",
    "+": "{name} has {a} {item} and gets {b} more. How many now?",
    "-": "{name} had {a} {item} and sold {b}. How many are left?",
    "*": "{name} fills {a} jars with {b} {item} each. How many {item} is that?",
}
"""The question of every strategy; a strategy is the operations to apply to a, b and c from left to right."""

NAMES = ("Ada", "Ben", "Chen", "Dana", "Emil", "Fatima", "Goran", "Hana", "Ivan", "Jonas", "Kofi", "Lena")
ITEMS = ("apples", "beads", "books", "cards", "coins", "eggs", "marbles", "nuts", "pears", "pens", "shells", "stamps")


@dataclass(frozen=True)
class Problem:
    """A word problem; `strategy` is its right strategy, and the key of its template."""

    strategy: str
    operands: tuple[int, ...]
    name: str
    item: str

    @property
    def question(self) -> str:
        numbers = dict(zip("abc", self.operands, strict=False))
        return TEMPLATES[self.strategy].format(name=self.name, item=self.item, **numbers)

    @property
    def answer(self) -> str:
        return str(_results(self.strategy, self.operands)[-1])

    @property
    def prompt(self) -> Prompt:
        return Prompt(messages=[{"role": "user", "content": self.question}], reference={"answer": self.answer})

    @property
    def demonstration(self) -> str:
        """The right worked answer."""
        return _work(self.strategy, self.operands)

    @property
    def slips(self) -> list[str]:
        """Worked answers with a wrong strategy; at least one."""
        return [_work(strategy, self.operands) for strategy in _slip_strategies(self.strategy, self.operands)]


class Arithmetic:
    """The task named `arithmetic`."""

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        """`held_out` is one fixed list: it ignores `seed` as well."""
        problems = train_problems(seed=seed, epoch=epoch) if split == "train" else held_out_problems()
        return (problem.prompt for problem in problems)

    def reward(self, completion: str, ticket: Ticket) -> float:
        return score(completion, ticket.reference["answer"])


def score(completion: str, answer: str) -> float:
    """1 if the text after the last mark is the answer, digit for digit, and nothing else; 0 otherwise."""
    _, mark, final = completion.rpartition(ANSWER_MARK)
    return float(mark == ANSWER_MARK and final.strip() == answer)


def train_problems(*, seed: int, epoch: int) -> Iterator[Problem]:
    rng = random.Random(f"train {seed} {epoch}")
    for _ in range(EPOCH_SIZE):
        yield _draw(rng, held_out=False)


def held_out_problems() -> Iterator[Problem]:
    """The same distinct problems in the same order, always."""
    rng = random.Random("held_out")
    seen: set[Problem] = set()
    while len(seen) < HELD_OUT_SIZE:
        problem = _draw(rng, held_out=True)
        if problem not in seen:
            seen.add(problem)
            yield problem


def _draw(rng: random.Random, *, held_out: bool) -> Problem:
    strategy = rng.choice(list(TEMPLATES))
    while True:
        operands = tuple(rng.choice(OPERANDS) for _ in range(len(strategy) + 1))
        if is_held_out(strategy, operands) == held_out and _is_solvable(strategy, operands):
            return Problem(strategy, operands, name=rng.choice(NAMES), item=rng.choice(ITEMS))


def is_held_out(strategy: str, operands: tuple[int, ...]) -> bool:
    return zlib.crc32(f"{strategy} {operands}".encode()) < HELD_OUT_SHARE * 2**32


def _is_solvable(strategy: str, operands: tuple[int, ...]) -> bool:
    """Whether the problem is easy, and has at least one slip."""
    return _is_easy(strategy, operands) and bool(_slip_strategies(strategy, operands))


def _is_easy(strategy: str, operands: tuple[int, ...]) -> bool:
    """Whether no result is negative and no product large."""
    results = _results(strategy, operands)
    products = [result for operation, result in zip(strategy, results, strict=True) if operation == "*"]
    return min(results) >= 0 and max(products, default=0) <= MAX_PRODUCT


def _slip_strategies(strategy: str, operands: tuple[int, ...]) -> list[str]:
    """Each way to mistake one operation, and to stop one step early, that is easy and leads to a wrong answer."""
    mistaken = [
        strategy[:step] + mistake + strategy[step + 1 :]
        for step, operation in enumerate(strategy)
        for mistake in MISTAKEN_FOR[operation]
    ]
    stopped_early = [strategy[:-1]] if len(strategy) > 1 else []
    answer = _results(strategy, operands)[-1]
    return [
        slip for slip in mistaken + stopped_early if _is_easy(slip, operands) and _results(slip, operands)[-1] != answer
    ]


def _results(strategy: str, operands: tuple[int, ...]) -> list[int]:
    """The result of every step; operands that the strategy does not reach are left out."""
    results: list[int] = []
    for operation, operand in zip(strategy, operands[1:], strict=False):
        results.append(_apply(operation, results[-1] if results else operands[0], operand))
    return results


def _apply(operation: str, left: int, right: int) -> int:
    if operation == "+":
        return left + right
    return left - right if operation == "-" else left * right


def _work(strategy: str, operands: tuple[int, ...]) -> str:
    """One line per step, and the answer: `13 + 15 = 28`, `28 - 12 = 16`, `#### 16`."""
    results = _results(strategy, operands)
    lefts = [operands[0], *results]
    steps = zip(lefts, strategy, operands[1:], results, strict=False)
    lines = [f"{left} {operation} {right} = {result}" for left, operation, right, result in steps]
    return "\n".join([*lines, f"{ANSWER_MARK} {results[-1]}"])
