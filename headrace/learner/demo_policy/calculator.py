"""The policy of the task `calculator`: it knows how to call the tool, and mostly does not, or asks for the wrong value.

A demonstration answers at once with any number, calls with a wrong operation, or does it right.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from headrace.common.tasks.arithmetic import MISTAKEN_FOR, Problem
from headrace.common.tasks.calculator import calculate, expression, prompt_of, train_problems
from headrace.common.wire import Message
from headrace.learner.demo_policy.conversations import Conversation, answered
from headrace.learner.demo_policy.recipe import SINGLE_DIGITS, Recipe

AT_ONCE_SHARE = 0.5
"""Share of demonstrations that answer without a call."""
SLIP_SHARE = 0.6
"""Share of the calls with a wrong operation."""
NUM_TEXTS = 5000
"""Conversations that the tokenizer is trained on."""

CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|system|>' + (tools | map(attribute='function') | list | tojson) + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{% set arguments = call['function']['arguments'] %}"
    "{{ '<tool_call>{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ arguments if arguments is string else arguments | tojson }}{{ '}</tool_call>' }}{% endfor %}"
    "{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def conversations(seed: int) -> Iterator[Conversation]:
    rng = random.Random(f"calls {seed}")
    for problem in train_problems(seed=seed, epoch=0):
        prompt = prompt_of(problem)
        if rng.random() < AT_ONCE_SHARE:
            yield answered(prompt, str(rng.randrange(100)))
        else:
            yield Conversation([*prompt.messages, *_calling(problem, rng)], prompt.tools)


def _calling(problem: Problem, rng: random.Random) -> list[Message]:
    """A call, its result, and the result as the answer."""
    strategy = list(problem.strategy)
    if rng.random() < SLIP_SHARE:
        place = rng.randrange(len(strategy))
        strategy[place] = rng.choice(MISTAKEN_FOR[strategy[place]])
    asked = expression("".join(strategy), problem.operands)
    call: dict[str, Any] = {"name": "calculate", "arguments": {"expression": asked}}
    value = calculate(asked)
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "call", "content": value},
        {"role": "assistant", "content": value},
    ]


def _texts() -> Iterator[str]:
    for conversation in islice(conversations(0), NUM_TEXTS):
        yield json.dumps([tool["function"] for tool in conversation.tools])
        for message in conversation.messages:
            yield message["content"]
            yield from (json.dumps(call["function"]) for call in message.get("tool_calls", []))


CALCULATOR = Recipe(
    task="calculator",
    conversations=conversations,
    texts=_texts,
    token_boundaries=SINGLE_DIGITS,
    chat_template=CHAT_TEMPLATE,
    added_tokens=("<tool_call>", "</tool_call>"),
    num_steps=1000,
    batch_size=32,
    learning_rate=2e-3,
    settings={"at_once_share": AT_ONCE_SHARE, "slip_share": SLIP_SHARE},
)
