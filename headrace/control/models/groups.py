"""The bodies of `/groups`: a sample of recent groups, and one group token by token."""

from typing import Any

from pydantic import Field

from headrace.common.wire import DecidedState, FinishReason, Role, SegmentOrigin, TicketKind
from headrace.control.models.bodies import ResponseBody


class GroupSummary(ResponseBody):
    id: str
    kind: TicketKind
    state: DecidedState
    step: int
    staleness: int | None
    replica: str
    rewards: list[float]
    num_tokens: int
    prompt: str = Field(description="The end of the last message, at most 200 characters.")
    decided_at: float


class Groups(ResponseBody):
    """The newest first."""

    groups: list[GroupSummary]
    num_kept: int = Field(description="How many recent groups control keeps, whatever the filter.")


class Segment(ResponseBody):
    """One token sequence of an episode."""

    origin: SegmentOrigin = Field(
        description="Why it begins: with a new conversation, because the agent rewrote its history, because the chat "
        "template drops text of earlier turns, or because other tools are offered."
    )
    prompt: int = Field(description="0: the ticket's prompt (`messages`); n: the n-th of the group's `prompts`.")


class Turn(ResponseBody):
    """A reply, or the messages between two."""

    role: Role
    segment: int
    start: int
    end: int = Field(description="A reply is the rollout's `tokens` from `start` to before `end`; else both are equal.")
    text: str = Field(description="Of messages, special tokens included; of a reply empty.")
    began_at: float
    ended_at: float
    cached_tokens: int = Field(description="Of a reply's context, the tokens that the engine had in its prefix cache.")


class Rollout(ResponseBody):
    """`tokens`, `weight_versions` and the log-probabilities have one entry per trained token."""

    text: str
    reward: float
    advantage: float | None
    finish_reason: FinishReason
    tokens: list[str]
    weight_versions: list[int] = Field(description="The version that sampled each token.")
    behaviour_logprobs: list[float]
    proximal_logprobs: list[float] | None
    segments: list[Segment] = Field(description="Of an episode; empty for one completion.")
    turns: list[Turn] = Field(description="Of an episode, by segment and place; empty for one completion.")
    metrics: dict[str, float] = Field(description="What the task measured besides the reward.")
    failed_episodes: int = Field(description="Episodes that failed before this one.")
    num_omitted_turns: int = Field(description="Last turns that were left out because of their size.")


class GroupDetail(GroupSummary):
    messages: list[dict[str, Any]]
    prompts: list[str] = Field(
        description="Prompts of segments besides `messages`, special tokens included; empty where no segment uses it."
    )
    rollouts: list[Rollout]
    issued_step: int
    leased_at: float
    sampled_at: float
    scored_at: float
    num_omitted: int = Field(description="Rollouts that were left out because of their size.")
