"""The lock that the intake's thread and the loop share."""

import threading


class IntakeLock(threading.Condition):
    """Notified when a group arrives, room for tickets appears, or the intake's thread fails."""

    def __init__(self) -> None:
        super().__init__()
        self._failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Ends the waits of other threads with `error`."""
        with self:
            self._failure = error
            self.notify_all()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
