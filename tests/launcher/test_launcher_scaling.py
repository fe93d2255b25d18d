"""`headrace scale`: a running launcher keeps as many replicas as are ordered, whatever they do, and the run goes on."""

import re
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest
import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire.desired_state import parse_desired_replicas
from tests.support.fake_services import RECIPE, SERVES, Fakes, Faking, ended, faking, processes_of, until
from tests.support.guard import GUARD_S
from tests.support.redis_servers import as_launched

__all__ = ["faking"]
QUICK = "supervisor.POLL_INTERVAL_S = 0.02; restart_policy.PAUSES_S = (0, 0.05)"
DRAINS = """
name = option("--name")
on(signal.SIGTERM, lambda: (note("drains " + name), sys.exit(0)))
note("serves " + name)
while True:
    signal.pause()
"""
CONTROL = Keys("faked").control


def scaled(fakes: Fakes, order: str, *arguments: str) -> str:
    return ended(fakes.headrace("scale", order, *arguments), 0)


def refused(fakes: Fakes, *arguments: str, code: int = 2) -> str:
    """The one line. Code 3: nobody runs who could obey."""
    (line,) = ended(fakes.headrace("scale", *arguments), code).splitlines()
    assert line.startswith("headrace: ")
    return line


def stopped(process: "subprocess.Popen[str]") -> str:
    process.send_signal(signal.SIGINT)
    return ended(process, 0)


def serving(*indices: int) -> list[str]:
    return [f"generation serves generation-{index}" for index in indices]


def client_of(fakes: Fakes) -> redis.Redis:
    return redis.Redis.from_url((fakes.run / "redis-url").read_text())


def test_the_launcher_follows_from_1_to_3_and_back(faking: Faking) -> None:
    fakes = faking(learner=SERVES, generation=DRAINS)
    process = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0), "learner serves")
    assert scaled(fakes, "3") == "run faked: target set to 3 replicas\n"
    fakes.wait_for(*serving(0, 1, 2))
    assert scaled(fakes, "1", "--run", "faked") == "run faked: target set to 1 replica\n"
    fakes.wait_for("generation drains generation-2", "generation drains generation-1")
    until(lambda: len(psutil.Process(process.pid).children()) == 4, "Redis, the learner, control and one replica")
    output = stopped(process)
    assert sorted(fakes.lines()).count("learner serves") == 1, "the run was not disturbed"
    assert [fakes.lines().count(line) for line in serving(0, 1, 2)] == [1, 1, 1], (
        "who was asked to end is not restarted"
    )
    assert fakes.lines()[-1] == "generation drains generation-0"
    for line in (
        "3 replicas, as requested",
        "1 replica, as requested",
        "generation-1 has left",
        "generation-2 has left",
    ):
        assert f"] {line}\n" in output
    assert not processes_of(fakes.run)


def test_replicas_that_crash_while_scaling_do_not_end_the_run(faking: Faking) -> None:
    """One that cannot be kept is given up until the target changes; one that was only unlucky is kept."""
    fakes = faking(
        learner=SERVES,
        generation="""
note("starts " + option("--name"))
if option("--name") == "generation-1" or num_notes("starts generation-2") == 1:
    print("no memory", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
        + DRAINS,
    )
    process = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0))
    scaled(fakes, "3")
    fakes.wait_for("generation starts generation-1", times=6)
    fakes.wait_for(*serving(2))
    scaled(fakes, "2")
    fakes.wait_for("generation drains generation-2")
    fakes.wait_for("generation starts generation-1", times=12)
    scaled(fakes, "1")
    output = stopped(process)
    assert output.count("given up until the target changes, the run goes on with") >= 1, output
    assert "the run goes on with 2 of its replicas: 5 restarts without progress: generation-1 was killed" in output
    assert "no memory" in output
    assert fakes.lines().count("learner serves") == fakes.lines().count("generation serves generation-0") == 1


def test_the_last_replica_that_cannot_be_kept_ends_the_run(faking: Faking) -> None:
    fakes = faking(learner=SERVES, generation="note('starts'); sys.exit(2)")
    output = ended(fakes.up("--replicas", "2", settings=QUICK), 1)
    assert re.search("the run goes on with 1 of its replicas: generation-[01] ended with 2", output), output
    assert re.search("headrace: generation-[01] ended with 2; the end of", output), output
    assert fakes.lines().count("generation starts") == 2


def test_a_replica_is_not_started_while_its_name_is_on_the_way_out(faking: Faking) -> None:
    fakes = faking(
        learner=SERVES,
        generation="""
name = option("--name")
on(signal.SIGTERM, lambda: note("asked " + name))
note("serves " + name)
while True:
    signal.pause()
""",
    )
    at_once = ("--set", "environment.drain_s=0")
    process = fakes.up("--replicas", "2", *at_once, settings=f"{QUICK}; up.REPLICA_GRACE_S = 1.0")
    fakes.wait_for(*serving(0, 1))
    scaled(fakes, "1")
    fakes.wait_for("generation asked generation-1")
    scaled(fakes, "2")
    fakes.wait_for(*serving(1), times=2)
    output = stopped(process)
    assert output.count("generation-1 did not leave within 1 s: killing it") == 1
    assert output.index("generation-1 did not leave") < output.index("generation-1 has left")


def test_scaled_to_0_generation_is_paused_and_the_run_goes_on(faking: Faking) -> None:
    fakes = faking(learner=SERVES, generation=DRAINS)
    process = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0), "learner serves")
    assert "target set to 1 replica" in scaled(fakes, "1")
    assert scaled(fakes, "0") == (
        "run faked: target set to 0 replicas; at 0 generation is paused, and the learner waits\n"
    )
    fakes.wait_for("generation drains generation-0")
    scaled(fakes, "1")
    fakes.wait_for(*serving(0), times=2)
    output = stopped(process)
    assert "] no replicas, as requested: generation is paused until more are requested (headrace scale)\n" in output
    assert "replicas: none, scaled to 0: generation is paused\n" in output
    assert fakes.lines().count("learner serves") == 1


def test_an_order_outlives_the_launcher_until_another_number_is_given(faking: Faking) -> None:
    fakes = faking(learner=SERVES, generation=DRAINS)
    process = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0))
    scaled(fakes, "2")
    fakes.wait_for(*serving(1))
    stopped(process)
    again = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0, 1), times=2)
    assert "] 2 replicas, as requested\n" in stopped(again)
    third = fakes.up("--replicas", "3", settings=QUICK)
    fakes.wait_for(*serving(2))
    with client_of(fakes) as client:
        assert client.hget(CONTROL, "desired_replicas") is None
    scaled(fakes, "1")
    fakes.wait_for("generation drains generation-2")
    assert "target cleared" in scaled(fakes, "--clear")
    fakes.wait_for(*serving(2), times=2)
    assert "] 3 replicas, as configured\n" in stopped(third)


ADVISES = """
on(signal.SIGUSR1, lambda: tell_learner(advice="it waits", advised_replicas=99))
tell_learner(advice="it waits", advised_replicas=3)
"""


def test_advice_is_followed_where_the_recipe_says_so_and_nobody_has_ordered(faking: Faking) -> None:
    fakes = faking(learner=f"{ADVISES}note('serves')\nwhile True:\n    signal.pause()", generation=DRAINS)
    process = fakes.up("--set", "generation.autoscale=true", "--set", "generation.max_replicas=4", settings=QUICK)
    fakes.wait_for(*serving(0, 1, 2), "learner serves")
    scaled(fakes, "2")
    fakes.wait_for("generation drains generation-2")
    (learner,) = [one for one in psutil.Process(process.pid).children() if "headrace.learner" in one.cmdline()]
    learner.send_signal(signal.SIGUSR1)
    with client_of(fakes) as client:
        until(lambda: client.hget(Keys("faked").learner, "advised_replicas") == b"99", "other advice")
    scaled(fakes, "1")
    fakes.wait_for("generation drains generation-1")
    scaled(fakes, "--clear")
    until(lambda: len(psutil.Process(process.pid).children()) == 4, "no advice beyond the bounds is obeyed")
    output = stopped(process)
    assert "] 3 replicas, as advised: it waits\n" in output and "] 1 replica, as requested\n" in output
    assert "the replica target is ignored: '99' replicas: expected a number from 0 to 64\n" in output


def test_advice_is_advice(faking: Faking) -> None:
    fakes = faking(learner=ADVISES + SERVES, generation=DRAINS)
    process = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0), "learner serves")
    scaled(fakes, "2")
    fakes.wait_for(*serving(1))
    assert "as advised" not in stopped(process)
    assert not set(serving(2)) & set(fakes.lines())


def test_an_order_that_makes_no_sense_is_told_and_not_obeyed(faking: Faking) -> None:
    """Also one that stood there before the launcher came."""
    fakes = faking(learner=KEEPS_A_BAD_ORDER, generation=DRAINS)
    process = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0), "learner serves")
    stopped(process)
    again = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0), "learner serves", times=2)
    scaled(fakes, "2")
    fakes.wait_for(*serving(1))
    output = stopped(again)
    assert output.count("the replica target is ignored: 'many' replicas: expected a number from 0 to 64\n") == 1


KEEPS_A_BAD_ORDER = f"redis('HSET', '{CONTROL}', 'desired_replicas', 'many')\n{SERVES}"


@pytest.mark.parametrize("order", ["-1", "65", "1.5", "many", "", "１", "0000000099"])
def test_what_is_no_number_of_replicas_is_refused(order: str) -> None:
    with pytest.raises(ValueError, match=f"{order!r} replicas: expected a number from 0 to 64"):
        parse_desired_replicas(order)


def test_a_bad_order_is_one_line(faking: Faking) -> None:
    fakes = faking()
    for order in ("-1", "65"):
        assert refused(fakes, order) == f"headrace: {order!r} replicas: expected a number from 0 to 64"


def test_a_number_out_of_bounds_is_refused_at_the_start(faking: Faking) -> None:
    fakes = faking(learner=SERVES)
    output = ended(fakes.up("--replicas", "65"), 2)
    assert "generation.replicas is 65: input should be less than or equal to 64" in output
    assert not fakes.run.exists()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of this module alone: other tests leave launchers in theirs."""
    with as_launched(tmp_path_factory.mktemp("redis")) as url:
        yield url


def test_an_order_that_nobody_would_obey_is_refused(faking: Faking, redis_url: str) -> None:
    fakes = faking(learner=SERVES)
    none = f"no launcher is running in {fakes.run.parent}; headrace up starts one"
    assert none in refused(fakes, "2", code=3)
    assert f"run 'faked' has no launcher in {fakes.run.parent}" in refused(fakes, "2", "--run", "faked", code=3)
    assert "no launcher is running in that Redis" in refused(fakes, "2", "--redis-url", redis_url, code=3)
    assert "expected 1 to 64 letters" in refused(fakes, "2", "--run", "../faked")
    process = fakes.up()
    fakes.wait_for("learner serves", "generation serves")
    process.kill()
    process.wait()
    assert none in refused(fakes, "2", code=3), "it has left its note"
    nowhere = "redis://127.0.0.1:1"
    assert "Redis does not answer: " in refused(fakes, "2", "--redis-url", nowhere, code=3)


def test_a_launcher_that_was_killed_is_soon_known_to_be_gone(faking: Faking, redis_url: str) -> None:
    """Beside a Redis that is not its own, where nothing else says so."""
    fakes = faking(learner=SERVES)
    keys = Keys("faked")
    process = fakes.up("--set", f"redis_url={redis_url}", settings=f"replica_target.PRESENCE_TTL_S = {GUARD_S}")
    with redis.Redis.from_url(redis_url) as client:
        until(lambda: bool(client.exists(keys.launcher)), "the launcher's key")
        assert "target set to 2 replicas" in scaled(fakes, "2", "--redis-url", redis_url)
        fakes.wait_for("generation serves", times=2)
        process.kill()
        process.wait()
        assert 0 < client.pttl(keys.launcher) <= 1000 * GUARD_S
        client.pexpire(keys.launcher, 1)  # as its time passes
        until(lambda: not client.exists(keys.launcher), "no launcher's key")
        assert "no launcher is running in that Redis" in refused(fakes, "3", "--redis-url", redis_url, code=3)
        assert client.hget(keys.control, "desired_replicas") == b"2"
        client.delete(keys.control)


def test_of_several_launchers_one_must_be_named(faking: Faking) -> None:
    fakes = faking(learner=SERVES, generation=DRAINS)
    first = fakes.up(settings=QUICK)
    fakes.wait_for(*serving(0))
    second = fakes.headrace("up", RECIPE, "--run", "other", settings=QUICK)
    fakes.wait_for(*serving(0), times=2)
    assert "2 runs are live (faked, other): expected --run" in refused(fakes, "2")
    assert scaled(fakes, "2", "--run", "other") == "run other: target set to 2 replicas\n"
    fakes.wait_for(*serving(1))
    assert "2 replicas, as requested" not in stopped(first)
    assert "2 replicas, as requested" in stopped(second)
