"""Child processes that do not outlive their parent, however it dies."""

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def dies_with_parent(signal_number: int = signal.SIGKILL) -> Callable[[], None]:
    """For `preexec_fn`: the kernel sends `signal_number` to the child when the starting thread has ended."""
    parent_pid = os.getpid()
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec nothing should be loaded

    def ask_the_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent_pid:  # it died before we asked
            os._exit(1)

    return ask_the_kernel
