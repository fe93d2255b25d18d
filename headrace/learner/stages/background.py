"""What is done beside the loop, in a thread: one thing at a time, and nothing that goes wrong in it stays unseen."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from headrace.common.process.waiting import Reason
from headrace.learner.stages.wait_deadlines import Patience

LOOK_S = 1.0
_log = logging.getLogger(__name__)


class Beside:
    """For one thread, the loop's. Whatever has failed is raised by the next call."""

    def __init__(self, name: str, patience: Patience, reason: Reason) -> None:
        """`reason`: why somebody waits for it."""
        self._patience = patience
        self._reason = reason
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._running: Future[None] | None = None

    def begin(self, act: Callable[[], None]) -> None:
        """Once what was begun before has ended."""
        self.wait()
        self._running = self._thread.submit(act)

    def wait(self, detail: str = "") -> None:
        """Until nothing is being done. Raises `Starved` if that takes too long."""
        while (running := self._running) is not None:
            try:
                running.result(LOOK_S)
                self._running = None
            except TimeoutError:
                if running.done():
                    raise
                self._patience.wait(self._reason, detail)
        self._patience.waits.over(self._reason)

    def check(self) -> None:
        if self._running is not None and self._running.done():
            self.wait()

    @property
    def is_busy(self) -> bool:
        self.check()
        return self._running is not None

    def close(self) -> None:
        """What is being done is brought to its end first."""
        self._thread.shutdown()
        if self._running is not None and (error := self._running.exception()):
            _log.warning("%s: %s", self._reason, error)
