"""A learner that is frozen until its replacement runs, and then woken: it must see that it was replaced, and end.

The replacement is started by hand, beside the launcher, with the launcher's arguments. The woken learner must end by
itself with code 3, which the launcher takes as final. Then, as a user would, the replacement is stopped with its
checkpoint, and the launcher started again.
"""

import time

from chaos.schedule import Fault
from chaos.targets import running_learner
from chaos.test_bed import Ground, Strike
from headrace.launcher.run.processes import Service
from headrace.learner.checkpoints.record import checkpoint_folders

RUNS_TIMEOUT_S = 120.0
"""For the replacement to take its first step."""
END_TIMEOUT_S = 60.0
STEPS_AHEAD = 100_000
FENCED = "learner ended with 3"


def replace_learner(ground: Ground, fault: Fault) -> Strike:
    """Has recovered when the replacement has taken a step; what follows is waited for as well, and not counted."""
    learner = running_learner(ground)
    began_s = time.time()
    epoch = ground.observer.epoch()
    learner.suspend()
    strike = Strike(fault, f"the learner ({learner.pid})", began_s, is_over=lambda: False, end=learner.resume)
    ground.strikes.append(strike)  # whatever happens now, it is woken
    replacement = ground.launched.another_learner(ground.proxied_url)
    try:
        ground.wait_until(
            lambda: (
                replacement.returncode is not None
                or (ground.observer.epoch() > epoch and ground.observer.works(began_s, began_s))
            ),
            RUNS_TIMEOUT_S,
            "a step of the replacement of a frozen learner",
        )
        strike.recovery_s = time.time() - began_s
        if replacement.returncode is not None:
            raise ground.error(f"the replacement {replacement.ending()}")
        _wake(ground, strike, epoch)
        _go_on(ground, replacement)
    finally:
        replacement.stop(END_TIMEOUT_S)
    strike.ended_s = time.time()  # the launcher starts everything again: nothing else is struck before that has worked
    return strike


def _wake(ground: Ground, strike: Strike, epoch: int) -> None:
    """The woken learner writes no checkpoint any more, and ends as fenced."""
    said = ground.launched.log.read_text().count(FENCED)
    written = _checkpoints_of(ground, epoch)
    strike.finish()
    woken = time.monotonic()
    ground.wait_until(
        lambda: not ground.launched.is_running,
        END_TIMEOUT_S,
        "the woken learner and with it the launcher to end",
        is_launcher_needed=False,
    )
    if ground.launched.log.read_text().count(FENCED) != said + 1:
        raise ground.error(f"the woken learner did not end with code 3 (expected {FENCED!r} in {ground.launched.log})")
    if more := _checkpoints_of(ground, epoch) - written:
        raise ground.error(f"the woken learner has written {', '.join(sorted(more))}")
    strike.note = f"the woken learner ended as fenced, all after {time.monotonic() - woken:.1f} s"


def _go_on(ground: Ground, replacement: Service) -> None:
    replacement.ask_to_stop()
    ground.wait_until(
        lambda: replacement.returncode is not None,
        END_TIMEOUT_S,
        "the replacement to stop with a checkpoint",
        is_launcher_needed=False,
    )
    if replacement.returncode != 0:
        raise ground.error(f"{replacement.ending()} when asked to stop")
    ground.launched.start(STEPS_AHEAD)


def _checkpoints_of(ground: Ground, epoch: int) -> set[str]:
    return {folder.name for folder in checkpoint_folders(ground.checkpoints) if f"-{epoch:06d}-" in folder.name}
