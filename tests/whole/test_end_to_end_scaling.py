"""The real stack scaled from one replica to three and back during a run: no step is missed, and nothing is lost."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire import WireError, decode_heartbeat
from tests.support.fake_services import ROOT
from tests.support.launched_run import Launched, is_alive, steps_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
"""Most of it is three starts of SGLang: 16 minutes in all on two cores with a load average of 40."""
SETTINGS = [
    "learner.steps=5000",
    "learner.groups_per_step=4",
    "learner.checkpoint_interval_steps=5",
    "evaluation.num_prompts=8",
]
KEYS = Keys("scaled")
NEWCOMERS = ("generation-1", "generation-2")


def headrace(*arguments: str) -> str:
    command = [sys.executable, "-m", "headrace.launcher", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done
    return done.stdout


def num_committed(url: str, name: str) -> int:
    with redis.Redis.from_url(url) as client, suppress(WireError):
        return decode_heartbeat(client.get(KEYS.replica(name)) or b"").groups_committed
    return 0


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    found = Launched(tmp_path, set[psutil.Process](), SETTINGS, "scaled")
    yield found
    found.process.kill()


def test_from_1_to_3_and_back_during_a_run(launched: Launched, tmp_path: Path) -> None:
    place = ["--runs-folder", str(tmp_path)]
    launched.wait_for("step 1,")
    assert headrace("scale", "3", *place) == "run scaled: target set to 3 replicas\n"
    url = (launched.run / "redis-url").read_text()
    before = num_committed(url, "generation-0")
    while num_committed(url, "generation-0") <= before or not all(num_committed(url, name) for name in NEWCOMERS):
        launched.wait_for("step ")
    at_three = steps_in(launched.run)[-1]
    assert headrace("scale", "1", *place) == "run scaled: target set to 1 replica\n"
    for _ in NEWCOMERS:
        launched.wait_for(" has left")
    launched.wait_for(f"step {steps_in(launched.run)[-1] + 3:.0f},")
    launched.process.send_signal(signal.SIGINT)
    output = launched.end()

    steps = steps_in(launched.run)
    assert at_three > 1 and steps == list(range(1, len(steps) + 1)), "no step was missed, and none taken twice"
    audited = headrace("audit", "--run", "scaled", *place)
    assert "dead       0\n" in audited and audited.rstrip().endswith("0 violations"), audited
    assert all(f"{name} has left" in output for name in NEWCOMERS), output
    assert "starting it again" not in output, output
    assert len(launched.seen) > 9 and not [process for process in launched.seen if is_alive(process)]
