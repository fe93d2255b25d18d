"""What is asked of the loop: by the run's orders in Redis, by the learner's own HTTP side, or by a signal.

The orders in Redis are the one truth. What comes over HTTP takes effect at once, is then written there by the intake,
and outlives the learner from that moment on; while Redis is away `unwritten` names it. A signal stops this process and
orders nothing.
"""

import threading
from collections.abc import Sequence

from headrace.common.wire.desired_state import CHECKPOINTS, PAUSED, STOP, Orders

WRITE_PATIENCE_S = 1.0

Order = tuple[str | int, ...]
"""A command on the hash `control`, without its key."""


class Switches:
    """`stop` and `paused` as they count now. Safe to use from any thread."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.paused = threading.Event()
        self._changed = threading.Condition()
        self._unwritten: list[Order] = []

    def pause(self) -> None:
        with self._changed:
            self.paused.set()
            self._unwritten.append(("HSET", PAUSED, 1))

    def resume(self) -> None:
        with self._changed:
            self.paused.clear()
            self._unwritten.append(("HDEL", PAUSED))

    def end(self) -> None:
        with self._changed:
            self.stop.set()
            self._unwritten.append(("HSET", STOP, 1))

    def has_ended(self) -> None:
        """A stop has been obeyed: the run's next life is not to stop."""
        with self._changed:
            self._unwritten.append(("HDEL", STOP))

    def ask_for_checkpoint(self) -> None:
        with self._changed:
            self._unwritten.append(("HINCRBY", CHECKPOINTS, 1))

    @property
    def unwritten(self) -> list[Order]:
        """What Redis does not know yet."""
        with self._changed:
            return list(self._unwritten)

    def written(self, orders: Sequence[Order]) -> None:
        """The first of `unwritten`, by the one thread that writes them."""
        with self._changed:
            del self._unwritten[: len(orders)]
            self._changed.notify_all()

    def wait_until_written(self) -> None:
        """Or for a moment: without Redis they wait."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unwritten, WRITE_PATIENCE_S)

    def follow(self, orders: Orders) -> None:
        """What stands in Redis, unless something newer is on its way there."""
        with self._changed:
            if self._unwritten:
                return
            if orders.is_stopping:
                self.stop.set()
            if orders.is_paused:
                self.paused.set()
            else:
                self.paused.clear()
