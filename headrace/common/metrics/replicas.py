"""Metrics of replicas, from their heartbeats: each replica exports its own, control exports all of them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import get_args

from headrace.common.metrics.families import Families
from headrace.common.process.waiting import Reason
from headrace.common.wire import Heartbeat, ReplicaState


def add_replica_states(families: Families, heartbeats: Iterable[Heartbeat]) -> None:
    counts = Counter(heartbeat.state for heartbeat in heartbeats)
    for state in get_args(ReplicaState):
        families.gauge("headrace_replicas", "Live replicas by state.", counts[state], state=state)


def add_replica(families: Families, heartbeat: Heartbeat) -> None:
    one = {"replica": heartbeat.replica}
    families.state_set(
        "headrace_replica_state", "1 for the replica's state.", "state", get_args(ReplicaState), heartbeat.state, **one
    )
    families.gauge(
        "headrace_replica_weight_version",
        "Weight version that the replica's engine has confirmed.",
        heartbeat.weight_version,
        **one,
    )
    families.gauge(
        "headrace_replica_groups_in_flight", "Tickets that the replica works on.", heartbeat.groups_in_flight, **one
    )
    families.counter(
        "headrace_replica_groups_total", "Groups that the replica has committed.", heartbeat.groups_committed, **one
    )
    families.counter(
        "headrace_replica_tokens_total",
        "Tokens of the groups that the replica has committed.",
        heartbeat.tokens_generated,
        **one,
    )
    families.counter(
        "headrace_replica_idle_seconds_total",
        "Seconds without a ticket in flight since the replica began to serve.",
        heartbeat.waiting_s,
        **one,
    )
    families.counter(
        "headrace_replica_serving_seconds_total",
        "Seconds since the replica began to serve.",
        heartbeat.serving_s,
        **one,
    )


def add_learner_waits(families: Families, waits: Mapping[str, float]) -> None:
    """`waits`: seconds by reason; every reason is exported, with 0 if the learner does not wait for it."""
    for reason in Reason:
        _add_wait(families, "learner", reason.value, waits.get(reason.value, 0.0))


def add_replica_waits(families: Families, replica: str, waits: Mapping[str, float]) -> None:
    """Exports only present waits, since there may be many replicas, and only reasons known to this release."""
    for reason in Reason:
        if reason in waits:
            _add_wait(families, replica, reason.value, waits[reason])


def _add_wait(families: Families, who: str, reason: str, seconds: float) -> None:
    text = "Seconds that the learner (who=learner) or a replica has been waiting, by reason."
    families.gauge("headrace_current_wait_seconds", text, seconds, who=who, reason=reason)
