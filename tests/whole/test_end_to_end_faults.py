"""The whole stack by its one command: stopped, resumed, its processes killed, complete."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.support.fake_services import redis_of
from tests.support.launched_run import Launched, is_alive, rows_of, short_run, steps_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
"""About two minutes on two idle cores, most of it three starts of SGLang."""
STEPS = 20
STEPS_OF_AN_OUTAGE = 4
"""That many may have been taken before it, and be told only after it."""
SHORT = short_run(STEPS)


class Finished(NamedTuple):
    run: Path
    first: str
    """What the first launcher said."""
    second: str
    processes: set[psutil.Process]
    """Every process of the launchers that was seen."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Its Redis is killed after step 1; a Ctrl-C comes when steps are taken again; then the learner and the replica are
    killed."""
    runs, seen = tmp_path_factory.mktemp("runs"), set[psutil.Process]()
    first = Launched(runs, seen, SHORT)
    second = None
    try:
        first.wait_for("step 1,")
        redis_of(first.run).kill()
        first.wait_for("redis was killed by SIGKILL: starting it again")
        told = [int(number) for number in re.findall(r"] step (\d+),", first.output)]
        first.wait_for(f"step {told[-1] + STEPS_OF_AN_OUTAGE},")
        first.process.send_signal(signal.SIGINT)
        interrupted = time.monotonic()
        first.wait_for("stopping")
        first_output = first.end()
        stop_s = time.monotonic() - interrupted
        print(f"stopped in {stop_s:.1f} s")
        last = steps_in(first.run)[-1]
        assert 2 <= last < STEPS - 4, first_output
        second = Launched(runs, seen, SHORT)
        second.wait_for(f"step {last + 1},")
        second.kill("headrace.learner", "headrace.generation")
        second.wait_for("held-out")
        second_output = second.end()
        yield Finished(first.run, first_output, second_output, seen)
    finally:
        for launched in filter(None, (first, second)):
            launched.process.kill()


def test_ctrl_c_stops_everything_in_time(finished: Finished) -> None:
    """Within each service's grace period, after which the launcher would have killed it."""
    assert "stopping: " in finished.first and ": killing it" not in finished.first.partition("stopping: ")[2]
    assert "continue with: headrace up" in finished.first


def test_what_is_killed_is_started_again(finished: Finished) -> None:
    assert "redis was killed by SIGKILL: starting it again" in finished.first
    assert "learner was killed by SIGKILL: starting it again" in finished.second
    assert "generation-0 was killed by SIGKILL: starting it again" in finished.second


def test_each_step_is_taken_once(finished: Finished) -> None:
    """Over a stop, and over kills of every process."""
    assert steps_in(finished.run) == list(range(1, STEPS + 1)), finished.second
    versions = [row["weight_version"] for row in rows_of(finished.run, "step")]
    assert versions == sorted(set(versions)), "versions only grow"


def test_the_resumed_run_is_complete(finished: Finished) -> None:
    summary = json.loads((finished.run / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["groups"]["trained"] == 4 * STEPS and summary["groups"]["dead"] == 0
    assert "held-out pass@1" in finished.second and f"step {STEPS}," in finished.second


def test_no_process_is_left(finished: Finished) -> None:
    assert len(finished.processes) > 8, "two launchers' Redis, learner, replica, SGLang and its parts"
    assert not [process for process in finished.processes if is_alive(process)]
