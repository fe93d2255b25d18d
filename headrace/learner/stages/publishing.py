"""Publishes beside the loop: the loop is held up for one copy of the weights in host memory, and no more.

A thread of its own encodes, hashes, writes and announces the copy while the next step runs. One version at a time, in
their order: who comes with the next one waits for the one before. A full disk is a wait with a deadline; whatever else
goes wrong is raised where the loop looks next.
"""

import errno
from collections.abc import Callable, Mapping
from functools import partial

from headrace.common.process.waiting import Reason
from headrace.learner.model.host_snapshots import Snapshot, Weight
from headrace.learner.stages.background import Beside
from headrace.learner.stages.wait_deadlines import Patience
from headrace.learner.steering.switches import Switches
from headrace.learner.weights.publisher import Versions

RETRY_S = 1.0
HELD_POLL_S = 0.1


class Publisher:
    def __init__(
        self, versions: Versions, patience: Patience, switches: Switches, is_held: Callable[[], bool] = lambda: False
    ) -> None:
        """`is_held`: nothing may be announced now; asked again and again."""
        self._is_held = is_held
        self._versions = versions
        self._patience = patience
        self._switches = switches
        self._beside = Beside("publish", patience, Reason.PUBLISHING)
        self.check, self.close = self._beside.check, self._beside.close

    def begin(self, tensors: Mapping[str, Weight], step: int, announced: Callable[[int], None]) -> None:
        """Returns when `tensors`, which `step` made, are copied and have a version's number, which they keep however
        often a full disk refuses them. `announced` is called with it when replicas can find the version, in another
        thread. Raises what the publication before has failed with."""
        self.wait()
        weights = self._versions.copy(tensors)
        self._versions.is_publishing = True
        self._beside.begin(partial(self._publish, weights, step, self._versions.reserve(), announced))

    def wait(self) -> None:
        """Until nothing is being published. Raises what it has failed with, and `Starved` if it takes too long."""
        self._beside.wait(f"version {self._versions.highest}")

    def _publish(self, weights: Snapshot, step: int, version: int, announced: Callable[[int], None]) -> None:
        while self._is_held() and not self._switches.stop.wait(HELD_POLL_S):
            pass
        while True:
            try:
                self._versions.publish(weights, step, version)
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
