"""A thread that works beside the loop: it runs one task at a time, and the loop raises whatever a task raised."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from headrace.common.process.waiting import Reason
from headrace.learner.stages.wait_deadlines import WaitDeadlines

POLL_S = 1.0
_log = logging.getLogger(__name__)


class BackgroundWorker:
    """Used by one thread, the loop's. Each method but `close` raises the exception of a task that has failed."""

    def __init__(self, name: str, wait_deadlines: WaitDeadlines, reason: Reason) -> None:
        """`reason`: the wait that is reported while the loop waits for a task."""
        self._wait_deadlines = wait_deadlines
        self._reason = reason
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._running: Future[None] | None = None

    def begin(self, task: Callable[[], None]) -> None:
        """Starts `task`; waits for the one before it first."""
        self.wait()
        self._running = self._thread.submit(task)

    def wait(self, detail: str = "") -> None:
        """Returns when no task is running. Raises `Starved` if that takes too long."""
        while (running := self._running) is not None:
            try:
                running.result(POLL_S)
                self._running = None
            except TimeoutError:
                if running.done():
                    raise
                self._wait_deadlines.note_wait(self._reason, detail)
        self._wait_deadlines.waits.end(self._reason)

    def raise_failure(self) -> None:
        if self._running is not None and self._running.done():
            self.wait()

    @property
    def is_busy(self) -> bool:
        self.raise_failure()
        return self._running is not None

    def close(self) -> None:
        """Finishes the running task; logs its failure."""
        self._thread.shutdown()
        if self._running is not None and (error := self._running.exception()):
            _log.warning("%s: %s", self._reason.text, error)
