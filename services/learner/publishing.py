"""Publishes beside the loop: the loop is held up for one copy of the weights in host memory, and no more.

A thread of its own encodes, hashes, writes and announces the copy while the next step runs. One version at a time, in
their order: who comes with the next one waits for the one before. A full disk is a wait with a deadline; whatever else
goes wrong is raised where the loop looks next.
"""

import errno
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from common.waiting import Reason
from services.learner.orders import Switches
from services.learner.patience import Patience
from services.learner.snapshots import Snapshot, Weight
from services.learner.versions import Versions

RETRY_S = 1.0
_log = logging.getLogger(__name__)


class Publisher:
    def __init__(self, versions: Versions, patience: Patience, switches: Switches) -> None:
        self._versions = versions
        self._patience = patience
        self._switches = switches
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._running: Future[None] | None = None

    def begin(self, tensors: Mapping[str, Weight], step: int, announced: Callable[[int], None]) -> None:
        """Returns when `tensors`, which `step` made, are copied. `announced` is called with the number of the version
        when replicas can find it, in another thread. Raises what the publication before has failed with."""
        self.wait()
        weights = self._versions.copy(tensors)
        self._versions.is_publishing = True
        self._running = self._thread.submit(self._publish, weights, step, announced)

    def wait(self) -> None:
        """Until nothing is being published. Raises what it has failed with, and `Starved` if it takes too long."""
        while (running := self._running) is not None:
            try:
                running.result(RETRY_S)
                self._running = None
            except TimeoutError:
                if running.done():
                    raise
                self._patience.wait(Reason.PUBLISHING, f"version {self._versions.highest}")
        self._patience.waits.over(Reason.PUBLISHING)

    def check(self) -> None:
        """Raises what a publication has failed with."""
        if self._running is not None and self._running.done():
            self.wait()

    def close(self) -> None:
        """What is on its way is brought to its end first."""
        self._thread.shutdown()
        if self._running is not None and (error := self._running.exception()):
            _log.warning("the last version was not announced: %s", error)

    def _publish(self, weights: Snapshot, step: int, announced: Callable[[int], None]) -> None:
        while True:
            try:
                version = self._versions.publish(weights, step).version
                break
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._patience.wait(Reason.VERSION, str(error))
                if self._switches.stop.wait(RETRY_S):
                    raise
        self._patience.waits.over(Reason.VERSION)
        self._versions.is_publishing = False
        announced(version)
