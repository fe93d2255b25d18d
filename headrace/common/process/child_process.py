"""Child processes: they end with their parent, however it dies, and get no more of the run's secrets than they need."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
RUN_VARIABLE_PREFIXES = ("HEADRACE_", "REDIS")
"""Prefixes of the variables that give access to the run: its token, the Redis URL, and the Redis password, from which
a pod's manifest makes the URL."""


def set_parent_death_signal(signal_number: int = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn`: the kernel will send `signal_number` to the child when the thread that started it has ended."""
    parent_pid = os.getpid()
    prctl = ctypes.CDLL(None).prctl  # loaded here, because nothing should be loaded between fork and exec

    def ask_the_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent_pid:  # the parent died before the call
            os._exit(1)

    return ask_the_kernel


def untrusted_code_environment() -> dict[str, str]:
    """This process's environment without the run's variables, for programs that run foreign code.

    All else stays, such as a judge's API key.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(RUN_VARIABLE_PREFIXES)}


def python_path() -> str:
    """The value of PYTHONPATH with which a child imports the same modules as this process."""
    return os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
