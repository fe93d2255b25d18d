"""`headrace up` keeps control: its page is told, its address noted, and its death ends nothing."""

import re
import signal

import psutil

from headrace.launcher.run.redis_server import short_timeout_client
from headrace.launcher.run.run_folder import CONTROL_URL_FILE
from tests.support.fake_services import SERVES, Faking, ended, faking, read_until
from tests.support.guard import GUARD_S

__all__ = ["faking"]
QUICK = "supervisor.POLL_INTERVAL_S = 0.02; restart_policy.PAUSES_S = (0, 0.1)"
NOTES_PLACE = "note(' '.join(arguments))\n" + SERVES


def test_the_page_is_told_with_the_token_at_the_first_start_only(faking: Faking) -> None:
    fakes = faking(learner=SERVES, control=NOTES_PLACE)
    outputs = []
    for times in (1, 2):
        process = fakes.up()
        fakes.wait_for("learner serves", "control serves", times=times)
        note = fakes.run / CONTROL_URL_FILE
        assert note.stat().st_mode & 0o777 == 0o600
        url = note.read_text()
        process.send_signal(signal.SIGINT)
        outputs.append(ended(process, 0))
        assert re.search(rf"the page: {url}(/#token=\S+)?\n", outputs[-1])
        port = url.rpartition(":")[2]
        place = f"control --run faked --token-file {fakes.run / 'token'} --host 127.0.0.1 --port {port}"
        assert url.startswith("http://127.0.0.1:") and place in fakes.lines()
        assert not note.exists()
    token = (fakes.run / "token").read_text()
    assert outputs[0].count(f"/#token={token}\n") == outputs[0].count(token) == 1 and token not in outputs[1]


def test_a_token_that_is_given_is_not_shown(faking: Faking) -> None:
    fakes = faking(learner=SERVES)
    process = fakes.headrace("up", "configs/tiny-cpu.yaml", "--run", "faked", HEADRACE_TOKEN="given-token")
    fakes.wait_for("learner serves")
    process.send_signal(signal.SIGINT)
    assert "given-token" not in ended(process, 0)


def controls_of(launcher: int) -> list[psutil.Process]:
    """One that has ended is there until the launcher has seen it."""
    found = []
    for child in psutil.Process(launcher).children():
        try:
            found += [child] if "headrace.control" in child.cmdline() else []
        except psutil.ZombieProcess:
            found.append(child)
    return found


def test_control_is_started_again_and_the_run_goes_on_without_it(faking: Faking) -> None:
    fakes = faking(learner=SERVES, control="note('serves')\nif num_notes('serves') < 3: signal.pause()\nsys.exit(1)")
    process = fakes.up(settings=f"{QUICK}; restart_policy.MAX_RESTARTS = 3")
    for times in (1, 2):
        fakes.wait_for("learner serves", "generation serves")
        fakes.wait_for("control serves", times=times)
        (control,) = controls_of(process.pid)
        control.kill()
    output = read_until(process, "control is given up, the run goes on without a page: 3 restarts without progress")
    assert output.count("control was killed by SIGKILL: starting it again") == 2
    assert fakes.lines().count("control serves") == 4 and not controls_of(process.pid)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    ended(process, 0)
    assert fakes.lines().count("learner serves") == fakes.lines().count("generation serves") == 1


def test_control_ends_after_the_learner(faking: Faking) -> None:
    ends = "on(signal.SIGTERM, lambda: (note('ends'), sys.exit(0)))\nnote('serves')\nwhile True: signal.pause()"
    fakes = faking(learner=ends.replace("sys.exit", "time.sleep(0.3) or sys.exit"), control=ends)
    process = fakes.up()
    fakes.wait_for("learner serves", "control serves")
    process.send_signal(signal.SIGINT)
    ended(process, 0)
    lines = fakes.lines()
    assert lines.index("learner ends") < lines.index("control ends")


def test_a_new_life_of_a_run_is_neither_paused_nor_stopped(faking: Faking) -> None:
    fakes = faking(learner="note(redis('HEXISTS', key, 'paused') + redis('HEXISTS', key, 'stop'))\n" + SERVES)
    fakes.executable.write_text(fakes.executable.read_text().replace("key,", "'headrace:{faked}:control',"))
    process = fakes.up()
    fakes.wait_for("learner :0:0", "learner serves")
    with short_timeout_client((fakes.run / "redis-url").read_text(), GUARD_S) as client:
        client.hset("headrace:{faked}:control", mapping={"paused": 1, "stop": 1, "checkpoints": 3})
        process.send_signal(signal.SIGINT)
        ended(process, 0)
    process = fakes.up()
    fakes.wait_for("learner :0:0", "learner serves", times=2)
    with short_timeout_client((fakes.run / "redis-url").read_text(), GUARD_S) as client:
        assert client.hget("headrace:{faked}:control", "checkpoints") == b"3"
    process.send_signal(signal.SIGINT)
    ended(process, 0)
