"""The bodies of `/replicas`: each live replica, and how many there are and should be."""

from pydantic import Field

from headrace.common.wire import ReplicaState
from headrace.control.models.bodies import ResponseBody


class ReplicaCounts(ResponseBody):
    live: int
    running: int
    desired: int | None = Field(description="The target that somebody has set; null if there is none.")
    advised: int | None = Field(description="How many replicas the learner estimates would keep it busy.")
    advice: str = Field(description="The reason for that number.")
    launcher: str | None = Field(
        description="The process that keeps the desired number running; null if there is none."
    )


class SwapPauses(ResponseBody):
    """How long a replica paused for new weights."""

    count: int
    p50_ms: float | None
    p95_ms: float | None
    latest_ms: float | None
    fetched_bytes: int = Field(description="Bytes fetched for the latest version.")


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
    idle_share: float | None = Field(description="Share of the last half minute without a ticket.")
    swap_pauses: SwapPauses
    seen_since_at: float = Field(description="When control first read its heartbeat.")


class Replicas(ResponseBody):
    replicas: list[Replica]
    counts: ReplicaCounts
