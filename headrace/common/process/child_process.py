"""Child processes that do not outlive their parent, however it dies, and know no more of the run than they need."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
RUN_VARIABLE_PREFIXES = ("HEADRACE_", "REDIS")
"""How the names of variables begin that lead to the run: its token, Redis' URL, and Redis' password, of which a pod's
manifest makes the URL."""


def set_parent_death_signal(signal_number: int = signal.SIGKILL) -> Callable[[], None]:
    """For `preexec_fn`: the kernel sends `signal_number` to the child when the starting thread has ended."""
    parent_pid = os.getpid()
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec nothing should be loaded

    def ask_the_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent_pid:  # it died before we asked
            os._exit(1)

    return ask_the_kernel


def untrusted_code_environment() -> dict[str, str]:
    """This process's environment without the run's variables, for programs that run foreign code.

    All else stays, such as a judge's API key.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(RUN_VARIABLE_PREFIXES)}


def python_path() -> str:
    """For a child's PYTHONPATH, so that it can import what we can."""
    return os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
