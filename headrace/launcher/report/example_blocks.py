"""A rollout of the report's examples in blocks: its tokens, or the turns of an episode."""

from typing import NamedTuple

from headrace.common.wire.group_samples import GroupSample, RolloutSample
from headrace.launcher.terminal.group_text import ORIGINS, spans

MAX_TOKENS = 600
"""Tokens that are shown of one block."""
MAX_BLOCKS = 60
GAPS = (0.01, 0.05, 0.2, 1.0)
"""Gaps between learner and engine in a token's log-probability: the classes g1 to g4 of the page."""


class Token(NamedTuple):
    text: str
    level: int
    title: str


class Block(NamedTuple):
    """Sampled tokens, or a text that was not sampled."""

    role: str = ""
    about: str = ""
    tokens: list[Token] | None = None
    text: str = ""
    rule: str = ""
    """Why a segment begins before it."""


def blocks(group: GroupSample, rollout: RolloutSample) -> list[Block]:
    """The first `MAX_BLOCKS`."""
    if not rollout.turns:
        return [Block(tokens=_tokens(rollout, 0, len(rollout.tokens)))]
    found: list[Block] = []
    segment = None
    for turn in rollout.turns:
        rule = ""
        if turn.segment != segment:
            opened = rollout.segments[turn.segment]
            rule = "" if segment is None else ORIGINS[opened.origin]
            if opened.prompt:
                found.append(Block("prompt", text=group.prompts[opened.prompt - 1], rule=rule))
                rule = ""
            segment = turn.segment
        about = f"{turn.ended_s - turn.began_s:.2f} s"
        if turn.role == "assistant":
            about += f", versions {spans(rollout.versions[turn.start : turn.end])}"
            found.append(Block(turn.role, about, _tokens(rollout, turn.start, turn.end), rule=rule))
        else:
            found.append(Block(turn.role, about, text=turn.text.strip("\n"), rule=rule))
    return found[:MAX_BLOCKS]


def _tokens(rollout: RolloutSample, start: int, end: int) -> list[Token]:
    learner = rollout.proximal_logprobs or rollout.behaviour_logprobs
    parts = zip(rollout.tokens, rollout.versions, learner, rollout.behaviour_logprobs, strict=False)
    return [
        Token(
            text,
            sum(abs(proximal - behaviour) > gap for gap in GAPS),
            f"version {version}, engine {behaviour:.3f}, learner {proximal:.3f}",
        )
        for text, version, proximal, behaviour in list(parts)[start : min(end, start + MAX_TOKENS)]
    ]
