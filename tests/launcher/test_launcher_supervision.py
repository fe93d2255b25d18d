"""`headrace up` with a real Redis and scripts for services: what it starts again, when it gives up, how it stops."""

import itertools
import re
import signal

import psutil
import pytest

from tests.support.fake_services import SERVES, Faking, ended, faking, processes_of, redis_of
from tests.support.guard import GUARD_S

__all__ = ["faking"]
QUICK = "supervisor.POLL_INTERVAL_S = 0.02; restart_policy.PAUSES_S = (0, 0.1, 0.2, 0.4)"


def test_a_learner_that_gets_somewhere_is_started_again_each_time(faking: Faking) -> None:
    fakes = faking(
        learner="""
note("starts")
tell_learner(step=num_notes("starts"))
if num_notes("starts") <= 10:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    output = ended(fakes.up(settings=QUICK), 0)
    assert fakes.lines().count("learner starts") == 11
    assert output.count("learner was killed by SIGKILL: starting it again") == 10, output


def test_steps_made_up_for_are_no_progress(faking: Faking) -> None:
    fakes = faking(
        learner="""
print("the learner's own words", flush=True)
note(f"starts {time.monotonic():.3f}")
for step in (1, 2, 3):
    tell_learner(step=step)
sys.exit(1)
""",
        generation="on(signal.SIGTERM, lambda: (note('drained'), sys.exit(0)))\nsignal.pause()",
    )
    output = ended(fakes.up(settings=QUICK), 1)
    starts = [float(line.split()[-1]) for line in fakes.lines() if line.startswith("learner starts")]
    assert len(starts) == 6
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(gap >= pause for gap, pause in zip(gaps, (0, 0.1, 0.2, 0.4, 0.4), strict=True)), gaps
    assert output.count("learner ended with 1: starting it again") == 5, output
    assert "headrace: 5 restarts without progress: learner ended with 1; the end of" in output
    assert output.rstrip().endswith("the learner's own words")
    assert "generation drained" in fakes.lines()
    assert not processes_of(fakes.run)


@pytest.mark.parametrize("code", [2, 3, 4])
def test_a_learner_that_another_start_would_not_help_ends_the_run(faking: Faking, code: int) -> None:
    fakes = faking(learner=f"note('starts'); tell_learner(reason='no group for 3 s'); sys.exit({code})")
    output = ended(fakes.up(settings=QUICK), 1)
    assert fakes.lines().count("learner starts") == 1
    assert f"headrace: learner ended with {code}: no group for 3 s; the end of" in output
    assert not processes_of(fakes.run)


def test_a_hung_learner_is_killed_and_started_again(faking: Faking) -> None:
    """One that has never answered is loading, be it for longer than a silence may last."""
    fakes = faking(
        learner="""
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        note("asked")
        if num_notes("asked") > 4:
            self.send_response(200)
            self.end_headers()

server = HTTPServer(("127.0.0.1", 0), Health)
note("starts")
tell_learner(url="http://127.0.0.1:%d" % server.server_port)
if num_notes("starts") == 2:
    sys.exit(0)
while num_notes("asked") < 5:
    server.handle_request()
os.kill(os.getpid(), signal.SIGSTOP)
"""
    )
    hang = (
        "supervisor.HANG_TIMEOUT_S = 1.0; liveness_probe.PROBE_INTERVAL_S = 0.4; liveness_probe.PROBE_TIMEOUT_S = 2.0"
    )
    output = ended(fakes.up(settings=f"{QUICK}; {hang}"), 0)
    assert (fakes.lines().count("learner asked"), fakes.lines().count("learner starts")) == (5, 2)
    assert re.search(r"the learner has not answered at http://127.0.0.1:\d+ for 1 s: killing it\n", output), output
    assert "learner was killed by SIGKILL: starting it again\n" in output


def test_the_embedded_redis_comes_back_with_everything_at_the_same_place(faking: Faking) -> None:
    fakes = faking(
        learner="""
redis("SET", "kept", "dear")
note("wrote")
while num_notes("killed it") == 0:
    time.sleep(0.01)
while True:
    try:
        note("reads " + redis("GET", "kept"))
        break
    except OSError:
        time.sleep(0.02)
"""
    )
    process = fakes.up(settings=QUICK)
    fakes.wait_for("learner wrote")
    server = redis_of(fakes.run)
    server.kill()
    psutil.wait_procs([server], timeout=GUARD_S)
    fakes.note("learner killed it")
    output = ended(process, 0)
    assert "learner reads dear" in fakes.lines()
    assert "redis was killed by SIGKILL: starting it again\n" in output


def test_replicas_are_started_again_within_bounds(faking: Faking) -> None:
    fakes = faking(learner=SERVES, generation="note('starts'); sys.exit(1)")
    output = ended(fakes.up("--set", "generation.replicas=2", settings=QUICK), 1)
    assert 6 < fakes.lines().count("generation starts") <= 12, "each has a count of its own"
    assert re.search(r"headrace: 5 restarts without progress: generation-[01] ended with 1; the end of", output), output


def test_a_replica_that_was_up_for_long_has_not_failed_in_vain(faking: Faking) -> None:
    fakes = faking(
        learner="while notes.exists() == 0 or notes.read_text().count('generation starts') < 8:\n    time.sleep(0.02)",
        generation="note('starts'); time.sleep(0.3); sys.exit(1)",
    )
    output = ended(fakes.up(settings=f"{QUICK}; up.SERVICE_UP_S = 0.2"), 0)
    assert output.count("generation-0 ended with 1: starting it again\n") >= 7


def test_a_replica_that_was_refused_ends_the_run(faking: Faking) -> None:
    fakes = faking(learner=SERVES, generation="print('no such port'); sys.exit(2)")
    output = ended(fakes.up(settings=QUICK), 1)
    assert "headrace: generation-0 ended with 2; the end of" in output and output.rstrip().endswith("no such port")


def test_why_a_replica_ended_is_on_the_screen(faking: Faking) -> None:
    """The newest start's own reason, not that of the one before."""
    script = """
note('starts')
count = num_notes('starts')
stamp = "2026-11-30T10:00:00.000Z"
if count == 1:
    print(stamp + " ERROR generation replica=a: the replica failed: RuntimeError: no weights", flush=True)
    print("Traceback (most recent call last):", flush=True)
if count == 3:
    print("headrace generation: task 'x:Y' cannot be imported", flush=True)
    sys.exit(2)
sys.exit(1)
"""
    output = ended(faking(learner=SERVES, generation=script).up(settings=QUICK), 1)
    lines = [line.partition("] ")[2] for line in output.splitlines() if "generation-0 ended" in line]
    assert lines[0] == "generation-0 ended with 1: the replica failed: RuntimeError: no weights: starting it again"
    assert lines[1] == "generation-0 ended with 1: starting it again in 0.1 s (2 of 5 without progress)"
    assert "headrace: generation-0 ended with 2: task 'x:Y' cannot be imported; the end of" in output


STOPS_TOGETHER = """
def stop():
    note("asked")
    while set("learner asked,generation asked".split(",")) - set(notes.read_text().splitlines()):
        time.sleep(0.02)
    for beat in range(50):
        redis("PING")
        time.sleep(0.01)
    note("ends well")
    sys.exit(0)
on(signal.SIGTERM, stop)
note("serves")
while True:
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_asks_learner_and_replicas_at_once_and_redis_last(faking: Faking, number: int) -> None:
    fakes = faking(learner=STOPS_TOGETHER, generation=STOPS_TOGETHER)
    process = fakes.up()
    fakes.wait_for("learner serves", "generation serves")
    process.send_signal(number)
    output = ended(process, 0)
    assert {"learner ends well", "generation ends well"} <= set(fakes.lines())
    assert "stopping" in output and "continue with: headrace up" in output
    assert not processes_of(fakes.run)


STUBBORN = "on(signal.SIGTERM, lambda: note('asked')); note('serves')\nwhile True:\n    signal.pause()"


def test_a_second_ctrl_c_kills_at_once(faking: Faking) -> None:
    fakes = faking(learner=STUBBORN, generation=STUBBORN)
    process = fakes.up()
    fakes.wait_for("learner serves", "generation serves")
    process.send_signal(signal.SIGINT)
    fakes.wait_for("learner asked", "generation asked")
    process.send_signal(signal.SIGINT)
    assert "headrace: killed on request" in ended(process, 1)
    assert not processes_of(fakes.run)


def test_what_does_not_stop_in_its_time_is_killed(faking: Faking) -> None:
    fakes = faking(learner=STOPS_TOGETHER, generation=STUBBORN)
    process = fakes.up(settings="up.REPLICA_GRACE_S = 0.3")
    fakes.wait_for("learner serves", "generation serves")
    process.send_signal(signal.SIGINT)
    assert "generation-0 did not stop within 0 s: killing it" in ended(process, 0)
    assert not processes_of(fakes.run)


def test_nothing_outlives_a_launcher_that_is_killed(faking: Faking) -> None:
    fakes = faking(learner=SERVES)
    process = fakes.up()
    fakes.wait_for("learner serves", "generation serves")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 4, children
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=GUARD_S)
    assert not alive
