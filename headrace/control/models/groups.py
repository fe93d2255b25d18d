"""The bodies of `/groups`: a sample of recent groups, and one group token by token."""

from pydantic import Field

from headrace.common.wire import DecidedState, FinishReason, TicketKind
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


class GroupDetail(GroupSummary):
    messages: list[dict[str, str]]
    rollouts: list[Rollout]
    issued_step: int
    leased_at: float
    sampled_at: float
    scored_at: float
    num_omitted: int = Field(description="Completions that were left out because of their size.")
