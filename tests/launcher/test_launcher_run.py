"""One launcher has a run; others find its Redis, or open its files; nobody sees a password."""

import importlib.util
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from headrace.common.http.addresses import free_port
from headrace.launcher.commands.replay import replay
from headrace.launcher.run.processes import Service
from headrace.launcher.run.redis_server import redis_binary, redis_url_at, wait_for_redis
from tests.support.fake_services import (
    RECIPE,
    ROOT,
    SERVES,
    Fakes,
    Faking,
    ended,
    faking,
    processes_of,
    redis_of,
    until,
)

__all__ = ["faking"]
SHOWS = "print(module, *arguments, redis('GET', 'kept')); sys.exit(7)"
"""The script of a command."""
KEEPS = "redis('SET', 'kept', 'dear')\n" + SERVES
PASSWORD = "correct-horse"


def refused(fakes: Fakes, *arguments: str, settings: str = "") -> str:
    """The one line."""
    (line,) = ended(fakes.headrace(*arguments, settings=settings), 2).splitlines()
    assert line.startswith("headrace: ")
    return line


def run_for_a_while(fakes: Fakes) -> None:
    process = fakes.up()
    fakes.wait_for("learner serves")
    process.send_signal(signal.SIGINT)
    ended(process, 0)


def test_one_launcher_at_a_time_has_a_run(faking: Faking) -> None:
    fakes = faking(learner=SERVES)
    first = fakes.up()
    fakes.wait_for("learner serves")
    (fakes.run / "config.yaml").write_text("the first one's")
    line = refused(fakes, "up", RECIPE, "--run", "faked")
    assert line == f"headrace: run 'faked' in {fakes.run} is in use by process {first.pid}"
    assert (fakes.run / "config.yaml").read_text() == "the first one's"
    assert fakes.lines().count("learner serves") == 1


def test_a_new_epoch_is_asked_of_the_learner_and_its_refusal_is_shown(faking: Faking) -> None:
    fakes = faking(learner="print('headrace learner: other data', '--new-epoch' in arguments); sys.exit(2)")
    assert "headrace learner: other data False" in ended(fakes.up(), 1)
    assert "headrace learner: other data True" in ended(fakes.up("--new-epoch"), 1)


def test_a_run_is_free_once_its_launcher_and_its_redis_have_ended(faking: Faking) -> None:
    """A second server on the append-only file would ruin it, so the next launcher waits for the first to end."""
    fakes = faking(learner=SERVES)
    first = fakes.up()
    fakes.wait_for("learner serves")
    server = redis_of(fakes.run)
    server.suspend()
    first.kill()
    first.wait()
    impatient = "from headrace.launcher.run import run_folder; run_folder.ORPHAN_TIMEOUT_S = 0.1"
    assert f"is in use by process {first.pid}" in refused(fakes, "up", RECIPE, "--run", "faked", settings=impatient)
    second = fakes.up()
    lock = str(fakes.run / "lock")
    until(lambda: lock in [file.path for file in psutil.Process(second.pid).open_files()], "the second at the lock")
    assert fakes.lines().count("learner serves") == 1
    server.resume()
    fakes.wait_for("learner serves", times=2)
    assert redis_of(fakes.run) != server
    second.send_signal(signal.SIGINT)
    ended(second, 0)


def test_a_command_finds_the_running_launchers_redis(faking: Faking) -> None:
    fakes = faking({"learner.commands.audit": SHOWS}, learner=KEEPS)
    process = fakes.up()
    fakes.wait_for("learner serves")
    note = fakes.run / "redis-url"
    assert note.stat().st_mode & 0o777 == 0o600
    shown = ended(fakes.headrace("audit", "--run", "faked"), 7)
    assert shown == f"headrace.learner.commands.audit --run faked --runs-folder {fakes.run.parent} dear\n"
    process.send_signal(signal.SIGINT)
    ended(process, 0)
    assert not note.exists()


def test_commands_open_the_files_of_a_run_that_is_over(faking: Faking, redis_url: str) -> None:
    """Also after a launcher that was killed: what it noted may be another run's server by now."""
    fakes = faking(
        {"learner.commands.audit": SHOWS, "learner.commands.record": SHOWS, "learner.commands.dead_letters": SHOWS},
        learner=KEEPS,
    )
    run_for_a_while(fakes)
    (fakes.run / "redis-url").write_text(redis_url)
    for arguments, handed_on in (
        ("audit --run faked --json", "audit --json"),
        ("record --run faked --output there", "record --output there"),
        ("dead-letters list", "dead_letters list"),
        ("dead-letters retry 0-1 0-2 --run faked", "dead_letters retry 0-1 0-2"),
        ("dead-letters purge --run faked", "dead_letters purge"),
    ):
        shown = ended(fakes.headrace(*arguments.split()), 7)
        ended_too = " --ended" if handed_on.startswith("record") else ""
        assert (
            shown
            == f"headrace.learner.commands.{handed_on} --run faked --runs-folder {fakes.run.parent}{ended_too} dear\n"
        )
        assert not processes_of(fakes.run)


def test_dead_tickets_are_in_the_last_line(faking: Faking) -> None:
    key = "'headrace:{' + option('--run') + '}:dead_letters'"
    dies = f"redis('XADD', {key}, '*', 'id', '0-1', 'reason', 'ValueError')"
    output = ended(faking(learner=dies).up(), 0)
    assert (
        output.splitlines()[-1] == "1 ticket is dead (headrace dead-letters list --run faked), the latest: ValueError"
    )
    output = ended(faking(learner=f"{dies}; sys.exit(2)").up(), 1)
    assert re.search(
        r"(1 ticket is|2 tickets are) dead \(headrace dead-letters list --run faked\), the latest: ValueError", output
    )


def test_a_task_beside_the_recipe_is_found_by_all_services(faking: Faking, tmp_path: Path) -> None:
    recipe = tmp_path / "mine" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text((ROOT / RECIPE).read_text().replace("headrace/demo", f"{ROOT}/headrace/demo"))
    shows = "note(os.environ['PYTHONPATH'].split(os.pathsep)[-1])"
    fakes = faking(learner=f"{shows}\nwhile notes.read_text().count('mine') < 2: time.sleep(0.02)", generation=shows)
    ended(fakes.headrace("up", str(recipe), "--run", "faked"), 0)
    assert {f"learner {recipe.parent}", f"generation {recipe.parent}"} <= set(fakes.lines())


def test_the_run_is_locked_while_a_command_has_its_files_open(faking: Faking) -> None:
    fakes = faking({"learner.commands.record": SERVES}, learner=SERVES)
    run_for_a_while(fakes)
    recorder = fakes.headrace("record", "--run", "faked")
    fakes.wait_for("record serves")
    line = refused(fakes, "up", RECIPE, "--run", "faked")
    assert line.endswith(f"is in use by process {recorder.pid}")
    assert "and no Redis answers at the URL in" in refused(fakes, "audit", "--run", "faked")


def test_a_given_url_comes_first(faking: Faking, redis_url: str) -> None:
    fakes = faking({"learner.commands.audit": SHOWS})
    with redis.Redis.from_url(redis_url) as client:
        client.set("kept", "elsewhere")
    for process in (
        fakes.headrace("audit", "--run", "nowhere", "--redis-url", redis_url),
        fakes.headrace("audit", "--run", "nowhere", HEADRACE_REDIS_URL=redis_url),
    ):
        assert ended(process, 7).endswith(" elsewhere\n")


def test_a_run_that_is_not_there_is_one_line(faking: Faking) -> None:
    fakes = faking()
    assert refused(fakes, "audit", "--run", "faked") == f"headrace: run 'faked': there is no folder {fakes.run}"
    assert "expected 1 to 64 letters" in refused(fakes, "audit", "--run", "../faked")
    fakes.run.mkdir(parents=True)
    line = refused(fakes, "audit", "--run", "faked")
    for place in ("--redis-url", "HEADRACE_REDIS_URL", f"launcher of {fakes.run}", f"{fakes.run / 'redis'}"):
        assert place in line


@pytest.fixture
def guarded_redis(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    command = [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", PASSWORD, "--save", ""]
    service = Service("redis", command, tmp_path / "redis.log")
    url = redis_url_at(port).replace("//", f"//:{PASSWORD}@")
    wait_for_redis(service, url)
    yield url
    service.stop(10.0)


def test_a_password_travels_in_the_environment_alone(faking: Faking, guarded_redis: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path(RECIPE).read_text() + f"redis_url: {guarded_redis}\n")
    fakes = faking({"learner.commands.audit": SHOWS}, learner=KEEPS)
    process = fakes.headrace("up", str(recipe), "--run", "faked")
    fakes.wait_for("learner serves", "generation serves")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 3, "a Redis of one's own is not started"
    assert PASSWORD not in " ".join(word for child in children for word in child.cmdline())
    token = (fakes.run / "token").read_text()
    assert token not in " ".join(word for child in children for word in child.cmdline())
    output = ended(fakes.headrace("audit", "--run", "faked"), 7)
    assert output.endswith(" dear\n")
    process.send_signal(signal.SIGINT)
    shown = ended(process, 0)
    assert shown.count(token) == 1, "the sign-in link of the first start"
    output += shown.replace(token, "")
    texts = [output, *(path.read_text() for path in fakes.run.rglob("*") if path.is_file() and path.name != "token")]
    assert not [text for text in texts if PASSWORD in text or token in text]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_replay_has_a_redis_of_its_own_and_is_stopped_by_ctrl_c(faking: Faking, tmp_path: Path, number: int) -> None:
    recording = tmp_path / "recording.msgpack"
    recording.touch()
    script = "on({}, lambda: (note('stops'), sys.exit(5)))\nnote(redis('PING'))\nprint(*arguments)\nsignal.pause()"
    fakes = faking(learner=script.format(int(number)))
    arguments = ["replay", str(recording), "--run", "faked"]
    process = fakes.headrace(*arguments, "--set", "seed=3", "--set", "learner.steps=2")
    fakes.wait_for("learner +PONG")
    assert "is in use by process" in refused(fakes, *arguments)
    assert redis_of(fakes.run)
    process.send_signal(number)
    assert ended(process, 5) == (
        f"--replay {recording} --run faked --runs-folder {fakes.run.parent} --set seed=3 --set learner.steps=2\n"
    )
    assert "learner stops" in fakes.lines()
    assert not processes_of(fakes.run)


def test_a_replay_by_a_recipe(faking: Faking, tmp_path: Path) -> None:
    recording = tmp_path / "recording.msgpack"
    fakes = faking(learner="print(*arguments, pathlib.Path(option('--config')).read_text())")
    arguments = ["replay", str(recording), "--run", "faked", "--config", RECIPE]
    assert "there is no such recording" in refused(fakes, *arguments)
    recording.touch()
    output = ended(fakes.headrace(*arguments, "--set", "seed=3"), 0)
    assert f"--config {fakes.run / 'config.yaml'}" in output and "\nseed: 3\n" in output and "--set" not in output
    assert "did you mean seed?" in refused(fakes, *arguments, "--set", "sed=3")


def test_a_replay_checks_first_that_its_packages_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = tmp_path / "recording.msgpack"
    recording.touch()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(ValueError, match=r"^not installed here: torch; expected, "):
        replay(recording, None, [], "faked", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_second_ctrl_c_kills_a_command(faking: Faking, redis_url: str) -> None:
    fakes = faking(
        {
            "learner.commands.audit": "on(signal.SIGINT, lambda: note('asked'))\nnote('serves')\n"
            "while True: signal.pause()"
        }
    )
    process = fakes.headrace("audit", "--run", "faked", "--redis-url", redis_url)
    fakes.wait_for("audit serves")
    process.send_signal(signal.SIGINT)
    fakes.wait_for("audit asked")
    process.send_signal(signal.SIGINT)
    ended(process, 128 + signal.SIGKILL)
