"""A group as people read it: the learner writes a sample of them, as JSON, into the bounded stream `samples`.

Of a completion there is an entry per token: its text, the weight version that sampled it, and its log-probabilities.
"""

import msgspec

from headrace.common.wire import DecidedState, FinishReason, TicketKind

MAX_SAMPLE_BYTES = 1 << 20
"""Of one group as JSON; completions beyond it are left out, from the last (`num_left_out`)."""


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
    """Of its ticket."""
    kind: TicketKind
    state: DecidedState
    step: int
    """The learner's, when it was decided: of a trained group the step that it made."""
    issued_step: int
    staleness: int | None
    """In steps; None of evaluation groups."""
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
