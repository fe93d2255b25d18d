"""Replaces a frozen learner and then wakes it: it must notice that it was replaced, and exit.

The replacement is started beside the launcher, with the launcher's arguments. The woken learner must exit with code 3,
after which the launcher does not restart it. Then the replacement is stopped with a checkpoint, as a user would do, and
the launcher is started again.
"""

import time

from chaos.schedule import Fault
from chaos.targets import running_learner
from chaos.test_bed import InjectedFault, TestBed
from headrace.launcher.run.processes import Service
from headrace.learner.checkpoints.record import checkpoint_folders

RUNS_TIMEOUT_S = 120.0
"""Time for the replacement to complete its first step."""
END_TIMEOUT_S = 60.0
STEPS_AHEAD = 100_000
FENCED = "learner ended with 3"


def replace_learner(test_bed: TestBed, fault: Fault) -> InjectedFault:
    """The run has recovered when the replacement completes a step; what follows is not counted in the recovery time."""
    learner = running_learner(test_bed)
    began_s = time.time()
    epoch = test_bed.observer.epoch()
    learner.suspend()
    injected_fault = InjectedFault(
        fault, f"the learner ({learner.pid})", began_s, is_over=lambda: False, end=learner.resume
    )
    test_bed.injected.append(injected_fault)  # the frozen learner is woken in any case
    replacement = test_bed.launched.start_replacement(test_bed.proxied_url)
    try:
        test_bed.wait_until(
            lambda: (
                replacement.returncode is not None
                or (test_bed.observer.epoch() > epoch and test_bed.observer.has_recovered(began_s, began_s))
            ),
            RUNS_TIMEOUT_S,
            "a step of the replacement of a frozen learner",
        )
        injected_fault.recovery_s = time.time() - began_s
        if replacement.returncode is not None:
            raise test_bed.error(f"the replacement {replacement.exit_summary()}")
        _wake(test_bed, injected_fault, epoch)
        _go_on(test_bed, replacement)
    finally:
        replacement.stop(END_TIMEOUT_S)
    injected_fault.ended_s = (
        time.time()
    )  # the launcher restarts everything; no other fault may come before that has worked
    return injected_fault


def _wake(test_bed: TestBed, injected_fault: InjectedFault, epoch: int) -> None:
    """Checks that the woken learner writes no further checkpoint and exits as fenced."""
    said = test_bed.launched.log.read_text().count(FENCED)
    written = _checkpoints_of(test_bed, epoch)
    injected_fault.finish()
    woken = time.monotonic()
    test_bed.wait_until(
        lambda: not test_bed.launched.is_running,
        END_TIMEOUT_S,
        "the woken learner and with it the launcher to end",
        is_launcher_needed=False,
    )
    if test_bed.launched.log.read_text().count(FENCED) != said + 1:
        raise test_bed.error(
            f"the woken learner did not end with code 3 (expected {FENCED!r} in {test_bed.launched.log})"
        )
    if more := _checkpoints_of(test_bed, epoch) - written:
        raise test_bed.error(f"the woken learner has written {', '.join(sorted(more))}")
    injected_fault.note = f"the woken learner ended as fenced, all after {time.monotonic() - woken:.1f} s"


def _go_on(test_bed: TestBed, replacement: Service) -> None:
    replacement.ask_to_stop()
    test_bed.wait_until(
        lambda: replacement.returncode is not None,
        END_TIMEOUT_S,
        "the replacement to stop with a checkpoint",
        is_launcher_needed=False,
    )
    if replacement.returncode != 0:
        raise test_bed.error(f"{replacement.exit_summary()} when asked to stop")
    test_bed.launched.start(STEPS_AHEAD)


def _checkpoints_of(test_bed: TestBed, epoch: int) -> set[str]:
    return {folder.name for folder in checkpoint_folders(test_bed.checkpoints) if f"-{epoch:06d}-" in folder.name}
