"""A group as people read it: the learner writes a sample of them, as JSON, into the bounded stream `samples`.

A completion has one entry per token: its text, the weight version that sampled it, and its log-probabilities.
"""

import msgspec

from headrace.common.wire import DecidedState, FinishReason, TicketKind

MAX_SAMPLE_BYTES = 1 << 20
"""Largest size of one group as JSON; completions beyond it are left out, from the last (`num_left_out`)."""


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
    prompt: list[dict[str, str]]
    """Chat messages."""
    rollouts: list[RolloutSample]
    leased_s: float
    sampled_s: float
    scored_s: float
    decided_s: float
    """Unix times."""
    num_left_out: int = 0
