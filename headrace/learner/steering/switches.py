"""Requests to stop, pause or checkpoint: from the run's desired state in Redis, the learner's HTTP API, or a signal.

Redis holds the desired state. A request over HTTP takes effect at once; the intake then writes it to Redis, and from
then on it outlives the learner. While Redis is away `unpersisted` has it. A signal stops this process alone and writes
nothing.
"""

import threading
from collections.abc import Sequence

from headrace.common.wire.desired_state import CHECKPOINTS, PAUSED, STOP, DesiredState

PERSIST_TIMEOUT_S = 1.0

ControlCommand = tuple[str | int, ...]
"""A Redis command on the hash `control`, without its key."""


class Switches:
    """`stop` and `paused` as they are now. Safe to use from any thread."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.paused = threading.Event()
        self._changed = threading.Condition()
        self._unpersisted: list[ControlCommand] = []

    def pause(self) -> None:
        with self._changed:
            self.paused.set()
            self._unpersisted.append(("HSET", PAUSED, 1))

    def resume(self) -> None:
        with self._changed:
            self.paused.clear()
            self._unpersisted.append(("HDEL", PAUSED))

    def request_stop(self) -> None:
        with self._changed:
            self.stop.set()
            self._unpersisted.append(("HSET", STOP, 1))

    def clear_stop(self) -> None:
        """The learner has stopped as requested; the next start of the run must not stop for the same request."""
        with self._changed:
            self._unpersisted.append(("HDEL", STOP))

    def request_checkpoint(self) -> None:
        with self._changed:
            self._unpersisted.append(("HINCRBY", CHECKPOINTS, 1))

    @property
    def unpersisted(self) -> list[ControlCommand]:
        """The commands that are not in Redis yet."""
        with self._changed:
            return list(self._unpersisted)

    def mark_persisted(self, commands: Sequence[ControlCommand]) -> None:
        """`commands`: the first of `unpersisted`. Only the one thread that writes them calls this."""
        with self._changed:
            del self._unpersisted[: len(commands)]
            self._changed.notify_all()

    def wait_until_persisted(self) -> None:
        """Returns after `PERSIST_TIMEOUT_S` in any case: without Redis the commands wait."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unpersisted, PERSIST_TIMEOUT_S)

    def sync_from(self, desired_state: DesiredState) -> None:
        """Takes over the state in Redis, unless a newer request is still to be written there."""
        with self._changed:
            if self._unpersisted:
                return
            if desired_state.is_stopping:
                self.stop.set()
            if desired_state.is_paused:
                self.paused.set()
            else:
                self.paused.clear()
