"""A group of two episodes as the learner shows it, made from a script.

It has tool calls, a history that the agent rewrote, two weight versions, and a limit that ended the second episode.
"""

import random
import re
from typing import Any, NamedTuple

from headrace.common.wire import FinishReason, Role, SegmentOrigin
from headrace.common.wire.group_samples import GroupSample, RolloutSample, SegmentSample, TurnSample

SYSTEM = "You calculate with the tool and answer with a line #### and the number."
QUESTION = (
    "A baker fills 17 trays with 24 rolls each. 39 rolls burn, and he sells the others in bags of 3. "
    "How many bags does he sell?"
)
_OPENING = "<|im_start|>assistant\n"
_SUMMARY = "Summary: 17 * 24 = 408 rolls were baked and 39 of them burnt, so 369 are left."
PROMPTS = [
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
    f"<|im_start|>user\n{_SUMMARY}<|im_end|>\n{_OPENING}"
]


class _Turn(NamedTuple):
    role: Role
    text: str
    seconds: float
    segment: int = 0
    version: int = 0


def _call(thought: str, expression: str) -> str:
    call = f'{{"name": "calculate", "arguments": {{"expression": "{expression}"}}}}'
    return f"{thought}\n<tool_call>\n{call}\n</tool_call><|im_end|>"


def _answer(value: str) -> str:
    return f"\n<|im_start|>user\n<tool_response>\n{value}\n</tool_response><|im_end|>\n{_OPENING}"


_SOLVED = (
    _Turn("assistant", _call("First all rolls.", "17 * 24"), 1.31, version=41),
    _Turn("tool", _answer("408"), 0.04),
    _Turn("assistant", _call("Without the burnt ones:", "408 - 39"), 0.94, version=41),
    _Turn("tool", _answer("369"), 0.05),
    _Turn("assistant", _call("Three in a bag.", "369 / 3"), 1.02, segment=1, version=42),
    _Turn("tool", _answer("123.0"), 0.04, segment=1),
    _Turn("assistant", "He sells 123 bags.\n#### 123<|im_end|>", 0.77, segment=1, version=42),
)
_LOST = (
    _Turn("assistant", _call("Bags of three from every tray:", "24 / 0"), 1.22, version=41),
    _Turn("tool", _answer("ZeroDivisionError: division by zero"), 0.04),
    _Turn("assistant", _call("Once more.", "24 / 0"), 1.13, version=42),
)


def episode_group(name: str = "0-700", step: int = 42, at: float = 1_000.0) -> GroupSample:
    """Two episodes of different rewards, trained in `step`, decided at the unix time `at`."""
    rng = random.Random(7)
    solved = _episode(rng, _SOLVED, at, 1.0, "stop", ("conversation", "history"))
    metrics = {"tool_calls": 2.0, "tool_errors": 2.0}
    lost = _episode(rng, _LOST, at, 0.0, "max_turns", ("conversation",), metrics=metrics, failed_episodes=1)
    return GroupSample(
        id=name,
        kind="train",
        state="trained",
        step=step,
        issued_step=step - 1,
        staleness=1,
        replica="generation-0",
        prompt=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}],
        rollouts=[solved, lost],
        leased_s=at - 8,
        sampled_s=at - 2,
        scored_s=at - 1.9,
        decided_s=at,
        prompts=PROMPTS,
    )


def _episode(
    rng: random.Random,
    script: tuple[_Turn, ...],
    at: float,
    reward: float,
    finish_reason: FinishReason,
    origins: tuple[SegmentOrigin, ...],
    **more: Any,
) -> RolloutSample:
    tokens: list[str] = []
    versions: list[int] = []
    turns = []
    now = at - 7
    for turn in script:
        start = len(tokens)
        is_reply = turn.role == "assistant"
        if is_reply:
            tokens += re.findall(r"<\|\w+\|>|</?\w+>|\s?[^\W\d]+|\s?\d|\s?[^\w\s<]|\s|<", turn.text)
            versions += [turn.version] * (len(tokens) - start)
        cached = 90 + 2 * start if is_reply and start else 0
        text, place = "" if is_reply else turn.text, (turn.segment, start, len(tokens))
        turns.append(TurnSample(turn.role, *place, text, now, now + turn.seconds, cached))
        now += turn.seconds
    behaviour = [round(-rng.expovariate(3), 4) for _ in tokens]
    return RolloutSample(
        text=script[-1].text,
        reward=reward,
        advantage=0.7071 if reward else -0.7071,
        finish_reason=finish_reason,
        tokens=tokens,
        versions=versions,
        behaviour_logprobs=behaviour,
        proximal_logprobs=[round(min(0.0, one + rng.gauss(0, 0.03)), 4) for one in behaviour],
        segments=[SegmentSample(origin, min(index, 1)) for index, origin in enumerate(origins)],
        turns=turns,
        **({"metrics": {"tool_calls": 3.0, "tool_errors": 0.0}} | more),
    )
