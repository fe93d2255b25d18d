"""The run's control state, as last read from Redis: its desired state, and the replicas that are alive.

It is cached, so that the loop and the HTTP API never wait for Redis; the intake's thread reads it again.
"""

from headrace.common.wire import Heartbeat
from headrace.common.wire.desired_state import DesiredState
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore


class ControlState:
    def __init__(self, store: LearnerStore, switches: Switches) -> None:
        self.desired_state = DesiredState()
        self.replicas: tuple[Heartbeat, ...] = ()
        self._store = store
        self._switches = switches

    @property
    def is_generation_paused(self) -> bool:
        """Generation is scaled to 0 replicas, and the last one has left."""
        return self.desired_state.desired_replicas == 0 and not self.replicas

    def sync_desired_state(self) -> None:
        """Writes the switches' requests that are not in Redis yet, then takes over the desired state from there."""
        if unpersisted := self._switches.unpersisted:
            self._store.write_control(unpersisted)
            self._switches.mark_persisted(unpersisted)
        self.desired_state = self._store.desired_state()
        self._switches.sync_from(self.desired_state)

    def poll(self) -> None:
        self.sync_desired_state()
        self.replicas = tuple(self._store.replicas())
