"""Exceptions that end a command, besides `ValueError` for an invalid request."""


class NotRunning(Exception):
    """There is no run to ask, or it does not answer."""


class ControlFailed(RuntimeError):
    """The control service answered that it failed."""
