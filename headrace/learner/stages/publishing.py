"""Publishes weights beside the loop, which waits only until they are copied into host memory.

A thread encodes, hashes, writes and announces the copy while the next step runs. Versions are published one at a time
and in order: the next one waits for the one before. A full disk is a wait with a deadline; any other failure is raised
by the loop's next call.
"""

import errno
from collections.abc import Callable, Mapping
from functools import partial

from headrace.common.process.waiting import Reason
from headrace.learner.model.host_snapshots import Snapshot, Weight
from headrace.learner.stages.background import BackgroundWorker
from headrace.learner.stages.wait_deadlines import WaitDeadlines
from headrace.learner.steering.switches import Switches
from headrace.learner.weights.publisher import WeightVersions

RETRY_S = 1.0
HOLD_POLL_S = 0.1


class BackgroundPublisher:
    def __init__(
        self,
        versions: WeightVersions,
        wait_deadlines: WaitDeadlines,
        switches: Switches,
        is_on_hold: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_on_hold`: polled; while it is true no version is published."""
        self._is_on_hold = is_on_hold
        self._versions = versions
        self._wait_deadlines = wait_deadlines
        self._switches = switches
        self._worker = BackgroundWorker("publish", wait_deadlines, Reason.WAITING_FOR_PUBLISH)
        self.raise_failure, self.close = self._worker.raise_failure, self._worker.close

    def begin(self, tensors: Mapping[str, Weight], step: int, on_announced: Callable[[int], None]) -> None:
        """Returns when `tensors`, the weights after `step`, are copied and have a version number, which they keep
        however often a full disk refuses them. `on_announced` is called with the version, in another thread, when
        replicas can find it. Raises the failure of the publication before."""
        self.wait()
        weights = self._versions.snapshot(tensors)
        self._versions.is_publishing = True
        self._worker.begin(partial(self._publish, weights, step, self._versions.reserve(), on_announced))

    def wait(self) -> None:
        """Returns when nothing is being published. Raises its failure, and `Starved` if it takes too long."""
        self._worker.wait(f"version {self._versions.highest}")

    def _publish(self, weights: Snapshot, step: int, version: int, on_announced: Callable[[int], None]) -> None:
        while self._is_on_hold() and not self._switches.stop.wait(HOLD_POLL_S):
            pass
        while True:
            try:
                self._versions.publish(weights, step, version)
                break
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._wait_deadlines.note_wait(Reason.PUBLISH_FAILING, str(error))
                if self._switches.stop.wait(RETRY_S):
                    raise
        self._wait_deadlines.waits.end(Reason.PUBLISH_FAILING)
        self._versions.is_publishing = False
        on_announced(version)
