"""What `headrace try` asks for, and what it is told by the process that plays."""

import msgspec

from headrace.common.wire.structs import Message, SegmentOrigin


class TrialRequest(msgspec.Struct, frozen=True):
    """What is to be played: tickets of the recipe's task, by the recipe's model or by one behind an endpoint."""

    config: str
    """The `RunConfig` as JSON."""
    tickets: list[bytes]
    """Encoded."""
    has_rollout: bool
    base_url: str = ""
    """Of an OpenAI-compatible endpoint; empty: an engine on the recipe's model."""
    model: str = ""
    """Its name at the endpoint."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine and the task's workers have started."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Nothing more will be played."""

    problem: str
    is_refusal: bool = False
    """The request was invalid."""


class ReplyReport(msgspec.Struct, frozen=True):
    """A reply of the model."""

    seconds: float
    num_tokens: int | None = None
    """None where no tokens are known."""


class SegmentReport(msgspec.Struct, frozen=True):
    """A conversation up to its last reply. Its last `len(replies)` messages of the assistant are those replies."""

    messages: list[Message]
    replies: list[ReplyReport]
    origin: SegmentOrigin = "conversation"
    num_prompt_tokens: int = 0
    num_environment_tokens: int = 0
    """Between replies. Both are 0 where no tokens are known."""


class RolloutReport(msgspec.Struct, frozen=True, tag=True):
    """An episode, or a completion."""

    ticket: str
    segments: list[SegmentReport]
    seconds: float
    finish_reason: str = "stop"
    reward: float | None = None
    """None if it failed, for the reason in `problem`."""
    metrics: dict[str, float] = {}
    problem: str = ""

    @property
    def replies(self) -> list[ReplyReport]:
        return [reply for segment in self.segments for reply in segment.replies]


TrialEvent = Ready | Failed | RolloutReport
