"""What a replica reports of itself: its state, the reason for it, and what it waits for."""

from headrace.common.config import GenerationConfig
from headrace.common.process.waiting import Reason, Waits
from headrace.common.wire import ReplicaState
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.rollouts import RolloutSource
from headrace.generation.tickets.in_flight import InFlight
from headrace.generation.weights.updater import WeightUpdater

FIRST_VERSION_TIMEOUT_S = 3600.0
REPORTED_REASONS = (
    Reason.ENGINE_STARTING,
    Reason.ENGINE_SILENT,
    Reason.WAITING_FOR_WEIGHTS,
    Reason.PAUSED,
    Reason.REWARDS_FAILING,
    Reason.NO_TICKETS,
)


class ReplicaStatus:
    """The state of one replica, from the states of its parts and its switches `is_paused` and `is_draining`."""

    def __init__(
        self,
        config: GenerationConfig,
        supervisor: EngineSupervisor,
        weights: WeightUpdater,
        rollouts: RolloutSource,
        in_flight: InFlight,
        waits: Waits,
    ) -> None:
        self.is_paused = False
        self.is_draining = False
        self._config = config
        self._supervisor = supervisor
        self._weights = weights
        self._rollouts = rollouts
        self._in_flight = in_flight
        self._waits = waits

    @property
    def state(self) -> ReplicaState:
        if self.is_draining:
            return "draining"
        if self._supervisor.problem or self._weights.problem:
            return "quarantined"
        if not self._in_flight.is_serving or self._weights.confirmed_incarnation != self._supervisor.incarnation:
            return "starting"
        return "paused" if self.is_paused else "running"

    @property
    def reason(self) -> str:
        problem = self._weights.problem
        return self._supervisor.problem or (f"weights: {problem}" if problem else self._waits.describe())

    def update_waits(self) -> None:
        """Updates the replica's `Waits`, except for outages of Redis, which its client reports."""
        now = self._current_wait()
        for reason in REPORTED_REASONS:
            if now is None or now[0] is not reason:
                self._waits.end(reason)
        if now is not None:
            self._waits.note(*now)

    def _current_wait(self) -> tuple[Reason, str, float | None] | None:
        """Reason, detail and deadline of what delays all or some of the replica's tickets."""
        supervisor, weights, config = self._supervisor, self._weights, self._config
        if supervisor.server is not None and not supervisor.serving.is_set():
            return Reason.ENGINE_STARTING, supervisor.problem, config.engine.startup_timeout_s
        if problem := supervisor.problem:
            return Reason.ENGINE_SILENT, problem, None
        if supervisor.is_overdue:
            return Reason.ENGINE_SILENT, "", supervisor.liveness.timeout_s
        if weights.problem:
            return Reason.WAITING_FOR_WEIGHTS, weights.problem, None
        if (newest := max(weights.awaited_versions, default=0)) > weights.version:
            detail = f"version {newest} is awaited, {weights.version} is served"
            is_first = not self._in_flight.is_serving
            return Reason.WAITING_FOR_WEIGHTS, detail, FIRST_VERSION_TIMEOUT_S if is_first else config.weights_timeout_s
        if self.is_paused:
            return Reason.PAUSED, "", None
        if self._rollouts.problem:
            return Reason.REWARDS_FAILING, self._rollouts.problem, None
        return (Reason.NO_TICKETS, "", None) if self.state == "running" and not self._in_flight else None
