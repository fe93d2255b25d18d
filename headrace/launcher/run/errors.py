"""What ends a command besides a refusal (`ValueError`)."""


class NotRunning(Exception):
    """There is no run to ask, or it does not answer."""


class ControlFailed(RuntimeError):
    """The control service answered that it failed."""
