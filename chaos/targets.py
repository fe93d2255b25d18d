"""The processes that faults strike, as they are at that moment; one that is being started again is waited for."""

from collections.abc import Callable

import psutil

from chaos.schedule import Fault
from chaos.test_bed import Ground

TARGET_TIMEOUT_S = 120.0


def running_learner(ground: Ground) -> psutil.Process:
    return _found(ground, ground.launched.learner, "a learner")


def running_replica(ground: Ground, index: int) -> psutil.Process:
    return _found(ground, lambda: ground.launched.replica(index), f"generation-{index}")


def engine_process(ground: Ground, fault: Fault) -> tuple[psutil.Process, str]:
    """The server or its scheduler, of one of the replicas."""
    index, part = divmod(fault.choose(2 * ground.launched.num_replicas), 2)
    what = f"SGLang's {('server', 'scheduler')[part]} of generation-{index}"

    def look() -> psutil.Process | None:
        parts = ground.launched.engine(index)
        return parts[part] if parts else None

    return _found(ground, look, what), what


def _found(ground: Ground, look: Callable[[], psutil.Process | None], what: str) -> psutil.Process:
    found: list[psutil.Process] = []

    def is_there() -> bool:
        process = look()
        found.extend([process] if process is not None else [])
        return bool(found)

    ground.wait_until(is_there, TARGET_TIMEOUT_S, what)
    return found[0]
