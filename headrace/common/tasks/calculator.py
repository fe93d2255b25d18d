"""A task with a tool: word problems whose numbers are too large for a small policy, and a calculator.

The policy calls `calculate` with an expression, reads its value, and answers with a number. The problems are those of
the task `arithmetic`, with operands up to 99, and held out by the same hash. The reward is 1 for the right answer,
however it was found, and 0 otherwise.
"""

import ast
import operator
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from headrace.common.environments import Chat, schema
from headrace.common.tasks import Outcome, Prompt, Split
from headrace.common.tasks.arithmetic import EPOCH_SIZE, ITEMS, NAMES, TEMPLATES, Problem, is_held_out
from headrace.common.wire import Ticket

HELD_OUT_SIZE = 2048
OPERANDS = range(2, 100)
MAX_EXPRESSION_CHARS = 200
MAX_DIGITS = 30
"""Of a value; larger ones are refused at each step, so that an expression cannot take long."""
OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def calculate(expression: str) -> str:
    """The value of an expression such as 3 * (4 + 5)."""
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"the expression has {len(expression)} characters, expected at most {MAX_EXPRESSION_CHARS}")
    return str(_value(ast.parse(expression, mode="eval").body))


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        value = OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    else:
        raise ValueError(f"{ast.unparse(node)!r} is not understood; expected whole numbers, +, -, * and parentheses")
    if abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"a value has more than {MAX_DIGITS} digits")
    return value


class Calculator:
    """The task named `calculator`."""

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        """`held_out` is one fixed list: it ignores `seed` as well."""
        problems = train_problems(seed=seed, epoch=epoch) if split == "train" else held_out_problems()
        return (prompt_of(problem) for problem in problems)

    async def rollout(self, chat: Chat, ticket: Ticket) -> Outcome:
        """Metrics: `calls`, how many there were; `failed_calls`, how many of them `calculate` refused."""
        num_calls, num_failed = 0, 0
        reply = await chat.reply()
        while reply.tool_calls:
            results = await reply.run(calculate)
            num_calls += len(results)
            num_failed += sum(result["content"].startswith("error: ") for result in results)
            reply = await chat.reply(*results)
        reward = float(reply.text.strip() == ticket.reference["answer"])
        return Outcome(reward, {"calls": float(num_calls), "failed_calls": float(num_failed)})


def prompt_of(problem: Problem) -> Prompt:
    return Prompt([{"role": "user", "content": problem.question}], {"answer": problem.answer}, [_tool()])


@cache
def _tool() -> dict[str, Any]:
    return schema(calculate)


def expression(strategy: str, operands: tuple[int, ...]) -> str:
    """Operations from left to right: `13 + 15 - 12`, `(13 + 15) * 12`."""
    text = str(operands[0])
    for place, (operation, operand) in enumerate(zip(strategy, operands[1:], strict=False)):
        left = f"({text})" if operation == "*" and set(strategy[:place]) & set("+-") else text
        text = f"{left} {operation} {operand}"
    return text


def train_problems(*, seed: int, epoch: int) -> Iterator[Problem]:
    rng = random.Random(f"train {seed} {epoch}")
    for _ in range(EPOCH_SIZE):
        yield _draw(rng, held_out=False)


def held_out_problems() -> Iterator[Problem]:
    """The same problems in the same order, always."""
    rng = random.Random("held_out")
    for _ in range(HELD_OUT_SIZE):
        yield _draw(rng, held_out=True)


def _draw(rng: random.Random, *, held_out: bool) -> Problem:
    strategy = rng.choice(list(TEMPLATES))
    while True:
        operands = tuple(rng.choice(OPERANDS) for _ in range(len(strategy) + 1))
        if is_held_out(strategy, operands) == held_out and int(calculate(expression(strategy, operands))) >= 0:
            return Problem(strategy, operands, name=rng.choice(NAMES), item=rng.choice(ITEMS))
