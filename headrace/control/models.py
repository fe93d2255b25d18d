"""What control answers and takes, typed: its OpenAPI document is made of these.

Times are unix seconds (`_at`) or durations (`_s`); shares are in 0 to 1; what has not been measured is null.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt

from headrace.common.wire import DecidedState, FinishReason, ReplicaState, TicketKind
from headrace.common.wire.desired_state import MAX_REPLICAS

Level = Literal["healthy", "waiting", "warning", "failed", "ended"]


def _whole(value: Any) -> Any:
    """3.0 is a whole number in JSON; text and truth values are none."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class ResponseBody(BaseModel):
    model_config = ConfigDict(frozen=True)


class RequestBody(BaseModel):
    """What a caller sends: nothing beside what is known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Verdict(ResponseBody):
    """Is the run well, and if not, what is wrong, since when, and what to do."""

    level: Level
    text: str = Field(description="One sentence.", examples=["healthy", "the learner starves: no live replica"])
    advice: str = Field("", description="What to do about it; empty where there is nothing to do.")
    since_at: float = Field(description="When this became so.")


class Check(ResponseBody):
    """One thing that can be wrong, whether it is or not."""

    name: str = Field(examples=["kl_behaviour_proximal", "replicas", "dead"])
    level: Level
    text: str
    value: float | None = None
    warn: float | None = Field(None, description="The threshold of a warning.")
    alarm: float | None = Field(None, description="The threshold of an alarm.")


class Wait(ResponseBody):
    component: str = Field(description="`learner` or a replica's name.")
    detail: str


class Staleness(ResponseBody):
    mean: float | None = None
    max: float | None = None
    in_flight: float | None = None
    in_queue: float | None = None


class Queues(ResponseBody):
    open_tickets: int = Field(description="Not yet answered, those in flight included.")
    leased_tickets: int = Field(description="Of these, held by a replica.")
    groups: int = Field(description="In the stream: waiting, in training, or waiting for two checkpoints.")
    evaluation_tickets: int
    dead: int


class Counts(ResponseBody):
    """Finished groups of the whole run, by state."""

    trained: int = 0
    uniform: int = 0
    stale: int = 0
    evaluated: int = 0
    dead: int = 0
    skipped: int = Field(0, description="Prompts that were too long to be issued.")
    generated_tokens: int = 0


class Evaluation(ResponseBody):
    step: int
    held_out: float = Field(description="pass@1: mean reward over all completions.")
    pass_at: dict[str, float] = Field({}, description="pass@k by k.", examples=[{"1": 0.81, "2": 0.9}])
    num_completions: int
    num_dead: int
    first_token_step_mean: float = Field(description="Mean step of the weights that answered.")
    version: int | None = Field(None, description="The weight version that was asked for.")
    is_best: bool = False
    at: float


class ReplicaCounts(ResponseBody):
    live: int
    running: int
    desired: int | None = Field(description="What is ordered; null if nobody has ordered any number.")
    advised: int | None
    advice: str
    launcher: str | None = Field(description="Who keeps as many as are ordered; null: nobody does.")


class Rates(ResponseBody):
    """Of the last steps."""

    generated_tokens_per_s: float | None = None
    trained_tokens_per_s: float | None = None
    steps_per_hour: float | None = None
    learner_waiting_share: float | None = None
    replicas_waiting_share: float | None = None


class Status(ResponseBody):
    """The whole run at a glance."""

    run: str
    at: float
    verdict: Verdict
    checks: list[Check]
    phase: str = Field(examples=["training", "waiting", "paused", "finished"])
    reason: str = Field(description="Why the learner waits; empty while it works.")
    is_paused: bool = Field(description="As ordered.")
    is_stopping: bool = Field(description="As ordered.")
    step: int
    steps: int = Field(description="Of the whole run.")
    version: int
    epoch: int
    wall_s: float | None = Field(description="From the first ticket, over all lives of the run.")
    remaining_s: float | None = Field(description="Expected, at the pace of the last steps.")
    reward_mean: float | None
    held_out: Evaluation | None = Field(description="The latest evaluation.")
    staleness: Staleness
    rates: Rates
    queues: Queues
    counts: Counts
    replicas: ReplicaCounts
    waits: list[Wait]
    settings_version: int


class Pauses(ResponseBody):
    """Weight swaps of a replica."""

    count: int
    p50_ms: float | None
    p95_ms: float | None
    latest_ms: float | None
    fetched_bytes: int = Field(description="Of the latest version.")


class Replica(ResponseBody):
    id: str
    url: str
    state: ReplicaState
    reason: str
    weight_version: int
    versions_behind: int
    groups_in_flight: int
    groups_committed: int
    tokens_generated: int
    tokens_per_s: float | None
    waiting_share: float | None
    pauses: Pauses
    seen_since_at: float = Field(description="When control first saw its heartbeat.")


class Replicas(ResponseBody):
    replicas: list[Replica]
    counts: ReplicaCounts


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
    num_kept: int = Field(description="Of how many recent groups, whatever the filter.")


class Rollout(ResponseBody):
    """`tokens`, `versions` and the log-probabilities have one entry per trained token."""

    text: str
    reward: float
    advantage: float | None
    finish_reason: FinishReason
    tokens: list[str]
    versions: list[int]
    behaviour_logprobs: list[float]
    proximal_logprobs: list[float] | None


class GroupDetail(GroupSummary):
    messages: list[dict[str, str]]
    rollouts: list[Rollout]
    issued_step: int
    leased_at: float
    sampled_at: float
    scored_at: float
    num_left_out: int


class History(ResponseBody):
    """Steps as columns of equal length, beside them evaluations; thinned evenly to at most `max_points` steps."""

    cursor: str = Field(description="Pass as `after` for the rows that came since.")
    steps: dict[str, list[float | None]] = Field(
        description="By name: step, at, wall_s, reward_mean, staleness_*, kl_behaviour_proximal, ess, …",
    )
    evaluations: list[Evaluation]
    num_steps: int = Field(description="Before thinning.")


class Event(ResponseBody):
    """One thing that happened; `kind` says how to read `event`."""

    id: str
    at: float
    kind: str = Field(examples=["swap", "evaluation", "settings", "order", "checkpoint", "replica"])
    text: str = Field(description="For people.")
    event: dict[str, Any]


class Events(ResponseBody):
    """The newest first."""

    events: list[Event]


class Setting(ResponseBody):
    value: int | float | None
    configured: int | float | None
    description: str


class SettingsResponse(ResponseBody):
    version: int = Field(description="Grows by one with every change; 0: as configured.")
    applied_version: int = Field(description="What the learner works with.")
    settings: dict[str, Setting] = Field(description="By dotted name, as in a recipe.")
    config: dict[str, Any] = Field(description="The whole configuration as it started, without secrets.")


class SettingsChange(RequestBody):
    version: Whole | None = Field(None, description="Refused with 409 if another change has come in between.")
    settings: dict[str, StrictInt | StrictFloat | None] = Field(
        min_length=1, max_length=16, description="null: as configured again.", examples=[{"optimizer.lr": 1e-5}]
    )


class DesiredReplicas(RequestBody):
    replicas: Annotated[int, Field(ge=0, le=MAX_REPLICAS), BeforeValidator(_whole)] | None = Field(
        description="null: no number is ordered any more."
    )


class CommandAccepted(ResponseBody):
    """An order stands; `text` says what will follow from it."""

    text: str
    status: Status | None = None


class Problem(ResponseBody):
    """RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
