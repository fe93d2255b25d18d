"""The body of `/status`: the verdict with every check behind it, and the state of the whole run."""

from typing import Literal

from pydantic import Field

from headrace.control.models.bodies import ResponseBody
from headrace.control.models.history import Evaluation
from headrace.control.models.replicas import ReplicaCounts

Level = Literal["healthy", "waiting", "warning", "critical", "ended"]


class Verdict(ResponseBody):
    """Whether the run is well; if not: what is wrong, since when, and what to do."""

    level: Level
    text: str = Field(description="One sentence.", examples=["healthy", "the learner starves: no live replica"])
    advice: str = Field("", description="What to do about it; empty if there is nothing to do.")
    since_at: float = Field(description="When the run entered this state.")


class Check(ResponseBody):
    """One check of the run, whatever its result."""

    name: str = Field(examples=["kl_behaviour_proximal", "replicas", "dead_letters"])
    level: Level
    text: str
    value: float | None = None
    warn: float | None = Field(None, description="Threshold of a warning.")
    alarm: float | None = Field(None, description="Threshold of an alarm.")


class Wait(ResponseBody):
    component: str = Field(description="`learner`, or the name of a replica.")
    reason: str = Field(
        description="A stable code; empty if there is only a text.", examples=["waiting_for_groups", "no_tickets"]
    )
    text: str = Field(description="For people: the reason with its details and duration.")
    for_s: float


class Staleness(ResponseBody):
    """Staleness in steps of the groups that were trained last."""

    mean: float | None = None
    max: float | None = None
    in_flight: float | None = Field(None, description="The part that arose while replicas sampled.")
    in_queue: float | None = Field(None, description="The part that arose while groups waited for the learner.")


class Queues(ResponseBody):
    open_tickets: int = Field(description="Training tickets without an answer, including those in flight.")
    leased_tickets: int = Field(description="Open tickets that a replica holds.")
    group_stream_length: int = Field(
        description="Scored groups in the stream: waiting, in training, or kept until two checkpoints hold them."
    )
    unread_groups: int | None = Field(
        None, description="Groups in the stream that the learner has not read yet (consumer lag)."
    )
    evaluation_tickets: int = Field(description="Evaluation tickets without an answer.")
    dead_letters: int


class Counts(ResponseBody):
    """Finished groups of the whole run, by state."""

    trained: int = 0
    uniform: int = 0
    stale: int = 0
    evaluated: int = 0
    dead_letters: int = 0
    skipped: int = Field(0, description="Prompts that were too long to become a ticket.")
    generated_tokens: int = 0


class Rates(ResponseBody):
    """Averages over the last steps."""

    generated_tokens_per_s: float | None = None
    trained_tokens_per_s: float | None = None
    steps_per_hour: float | None = None
    learner_idle_share: float | None = Field(None, description="Share of its time that the learner waited for groups.")
    replicas_idle_share: float | None = Field(None, description="Share of their time that replicas had no ticket.")


class Status(ResponseBody):
    """The state of the whole run."""

    run: str
    at: float
    verdict: Verdict
    checks: list[Check]
    phase: str = Field(examples=["training", "waiting", "paused", "finished"])
    reason: str = Field(description="Why the learner waits; empty while it works.")
    is_paused: bool = Field(description="Somebody has asked for a pause.")
    is_stopping: bool = Field(description="Somebody has asked the run to stop.")
    step: int = Field(description="Completed steps.")
    target_steps: int = Field(description="The run ends after this many steps.")
    weight_version: int
    fencing_epoch: int = Field(description="Grows by one at each start of the learner.")
    wall_s: float | None = Field(description="Since the first ticket, over all restarts of the run.")
    remaining_s: float | None = Field(description="Expected, at the pace of the last steps.")
    sampled_reward_mean: float | None
    latest_evaluation: Evaluation | None
    staleness: Staleness
    rates: Rates
    queues: Queues
    counts: Counts
    replicas: ReplicaCounts
    waits: list[Wait]
    settings_version: int
