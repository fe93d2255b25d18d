"""A group as people read it: the learner writes a sample of them, as JSON, into the bounded stream `samples`.

A rollout has one entry per sampled token: its text, the weight version that sampled it, and its log-probabilities. The
turns of an episode name their ranges of these entries.
"""

from typing import Any

import msgspec

from headrace.common.wire import DecidedState, FinishReason, Role, SegmentOrigin, TicketKind

MAX_SAMPLE_BYTES = 1 << 20
"""Largest size of one group as JSON. The last turns of the first episode beyond it are left out (`num_turns_left_out`),
and the rollouts after it (`num_left_out`)."""
MAX_TEXT_CHARS = 20_000
"""Largest length of a prompt's or a turn's text; the middle of a longer one is left out, and the text says so."""


class SegmentSample(msgspec.Struct, frozen=True):
    origin: SegmentOrigin
    prompt: int = 0
    """0: the ticket's prompt; n: the n-th of the group's `prompts`."""


class TurnSample(msgspec.Struct, frozen=True):
    """A reply, or the messages between two."""

    role: Role
    segment: int
    start: int
    end: int
    """A reply is the rollout's tokens `[start, end)`; for messages `start` and `end` are equal."""
    text: str
    """Of messages, special tokens included; of a reply empty, as its tokens have it."""
    began_s: float
    ended_s: float
    """Unix times."""
    cached_tokens: int = 0
    """Of a reply's context, the tokens that the engine found in its prefix cache."""


class RolloutSample(msgspec.Struct, frozen=True):
    """`tokens`, `versions`, `behaviour_logprobs` and `proximal_logprobs` have one entry per trained token."""

    text: str
    reward: float
    advantage: float | None
    """None: it was not trained."""
    finish_reason: FinishReason
    tokens: list[str]
    versions: list[int]
    behaviour_logprobs: list[float]
    proximal_logprobs: list[float] | None = None
    """None: it was not trained."""
    segments: list[SegmentSample] = []
    turns: list[TurnSample] = []
    """Of an episode, by segment and place; both are empty for one completion."""
    metrics: dict[str, float] = {}
    failed_episodes: int = 0
    """Episodes that failed before this one."""
    num_turns_left_out: int = 0


class GroupSample(msgspec.Struct, frozen=True):
    id: str
    """Its ticket's id."""
    kind: TicketKind
    state: DecidedState
    step: int
    """The learner's step when the group was decided; of a trained group, the step that trained it."""
    issued_step: int
    staleness: int | None
    """In steps; None for evaluation groups."""
    replica: str
    prompt: list[dict[str, Any]]
    """Chat messages."""
    rollouts: list[RolloutSample]
    leased_s: float
    sampled_s: float
    scored_s: float
    decided_s: float
    """Unix times."""
    num_left_out: int = 0
    """Rollouts."""
    prompts: list[str] = []
    """Besides the ticket's, special tokens included; one with which no segment here begins is empty."""
