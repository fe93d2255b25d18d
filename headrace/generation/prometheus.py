"""A replica's Prometheus metrics: its heartbeat, its waits, and the counters of its parts since it started."""

from collections import Counter
from collections.abc import Callable

from headrace.common.metrics.families import Families
from headrace.common.metrics.replicas import add_replica, add_replica_waits
from headrace.common.process.waiting import Waits
from headrace.common.wire import Heartbeat
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.rollouts import RolloutSource
from headrace.generation.tickets.store import TicketStore
from headrace.generation.weights.downloads import Fetcher
from headrace.generation.weights.updater import WeightUpdater

OUTCOMES = ("committed", "duplicate", "failed", "dead", "handed_back", "interrupted")


class ReplicaMetrics:
    """Collects the metrics; called at each scrape, in the replica's event loop."""

    def __init__(
        self,
        heartbeat: Callable[[], Heartbeat],
        waits: Waits,
        supervisor: EngineSupervisor,
        weights: WeightUpdater,
        tickets: TicketStore,
        rollouts: RolloutSource,
    ) -> None:
        self._heartbeat = heartbeat
        self._waits = waits
        self._supervisor = supervisor
        self._weights = weights
        self._tickets = tickets
        self._rollouts = rollouts

    def __call__(self) -> Families:
        heartbeat, families = self._heartbeat(), Families(run=self._tickets.keys.run)
        name, supervisor = heartbeat.replica, self._supervisor
        add_replica(families, heartbeat)
        add_replica_waits(families, name, self._waits.durations_s())
        self._weights.totals.collect(families, name)
        _add_sources(families, self._weights.fetcher, name)
        families.counter(
            "headrace_replica_engine_restarts_total",
            "Restarts of its engine; of an external engine, how often it began to answer again.",
            max(0, supervisor.incarnation - 1),
            replica=name,
        )
        families.gauge(
            "headrace_replica_engine_silent_seconds",
            "Seconds since the engine's last sign of life.",
            supervisor.liveness.silent_s,
            replica=name,
        )
        for outcome in OUTCOMES:
            families.counter(
                "headrace_replica_tickets_total",
                "Leased tickets by outcome.",
                self._tickets.outcomes[outcome],
                replica=name,
                outcome=outcome,
            )
        self._rollouts.collect(families, name)
        return families


def _add_sources(families: Families, fetcher: Fetcher, replica: str) -> None:
    """Labels by kind of source; a label with the URL would add a series for each replica that ever ran."""
    for source in ("folder", "http"):
        labels = {"replica": replica, "source": source}
        families.counter(
            "headrace_replica_fetched_bytes_total",
            "Bytes of weights by source.",
            _sum_by_kind(fetcher.num_bytes, source),
            **labels,
        )
        families.counter(
            "headrace_replica_fetch_failures_total",
            "Files that a source could not serve.",
            _sum_by_kind(fetcher.failures, source),
            **labels,
        )
        families.counter(
            "headrace_replica_checksum_mismatches_total",
            "Files of a source with wrong bytes.",
            _sum_by_kind(fetcher.checksum_mismatches, source),
            **labels,
        )


def _sum_by_kind(counts: Counter[str], kind: str) -> int:
    return sum(count for source, count in counts.items() if source.startswith("file:") == (kind == "folder"))
