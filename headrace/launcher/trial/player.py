"""The process that plays what `headrace try` asks for (headrace/generation/trial)."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from headrace.common.process.child_process import python_path, set_parent_death_signal
from headrace.common.wire.trial_report import Failed, TrialEvent, TrialRequest

MODULE = "headrace.generation.trial"
END_DEADLINE_S = 20.0
"""For its engine and workers to end."""


@contextmanager
def playing(request: TrialRequest) -> Iterator[Iterator[TrialEvent]]:
    """The events of the process, which has ended after the block, with all that it started, however the block ends.

    It is in a session of its own: a Ctrl-C reaches only this process, which then ends it.
    """
    with subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": python_path()},
        start_new_session=True,
        preexec_fn=set_parent_death_signal(),
    ) as process:
        try:
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(msgspec.msgpack.encode(request))
            yield _events(process)
        finally:
            _end(process)


def _events(process: "subprocess.Popen[bytes]") -> Iterator[TrialEvent]:
    assert process.stdout is not None
    for line in process.stdout:
        yield msgspec.json.decode(line, type=TrialEvent)
    if process.wait():
        yield Failed(f"the process that plays ended with {process.returncode}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(END_DEADLINE_S)
    finally:
        process.kill()
