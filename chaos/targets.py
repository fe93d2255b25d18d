"""Finds the processes that faults hit. It waits for a process that is being restarted."""

from collections.abc import Callable

import psutil

from chaos.schedule import Fault
from chaos.test_bed import TestBed

TARGET_TIMEOUT_S = 120.0


def running_learner(test_bed: TestBed) -> psutil.Process:
    return _found(test_bed, test_bed.launched.learner, "a learner")


def running_replica(test_bed: TestBed, index: int) -> psutil.Process:
    return _found(test_bed, lambda: test_bed.launched.replica(index), f"generation-{index}")


def engine_process(test_bed: TestBed, fault: Fault) -> tuple[psutil.Process, str]:
    """The server or the scheduler of one of the replicas' engines."""
    index, part = divmod(fault.choose(2 * test_bed.launched.num_replicas), 2)
    what = f"SGLang's {('server', 'scheduler')[part]} of generation-{index}"

    def look() -> psutil.Process | None:
        parts = test_bed.launched.engine(index)
        return parts[part] if parts else None

    return _found(test_bed, look, what), what


def _found(test_bed: TestBed, look: Callable[[], psutil.Process | None], what: str) -> psutil.Process:
    found: list[psutil.Process] = []

    def is_there() -> bool:
        process = look()
        found.extend([process] if process is not None else [])
        return bool(found)

    test_bed.wait_until(is_there, TARGET_TIMEOUT_S, what)
    return found[0]
