"""`headrace logs`: the files of a run as one, in the order of time; a ticket through every service."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from headrace.common.redis.keys import Keys
from headrace.launcher.__main__ import app
from headrace.launcher.run.live_runs import choose_run
from headrace.launcher.run.log_files import LogFilter, LogFollower, read_logs

LEARNER = """headrace learner: an odd line before any time
2026-11-23T01:00:00.100Z INFO learner run=demo step=0 version=1 tickets=0-1,0-2,0-3: issued
2026-11-23T01:00:03.000Z INFO learner run=demo step=0 tickets=0-2: arrived, uniform
2026-11-23T01:00:03.500Z INFO learner run=demo step=0 tickets=0-1,0-3: arrived
2026-11-23T01:00:05.000Z ERROR learner run=demo step=1: the learner failed
  Traceback (most recent call last):
  ValueError: no
Traceback (most recent call last):
ValueError: at the top
2026-11-23T01:00:09.000Z INFO learner run=demo step=1 tickets=0-1,0-3: trained
"""
REPLICA = """2026-11-23T01:00:01.000Z INFO generation run=demo replica=generation-0 ticket=0-1: leased, for version 1
2026-11-23T01:00:02.000Z WARNING generation run=demo replica=generation-0 ticket=0-1: attempt 1 of 3 failed: no
2026-11-23T01:00:02.500Z INFO generation run=demo replica=generation-0 version=1 ticket=0-1: committed
"""
REDIS = "123:M 23 Nov 2026 01:00:04.000 # WARNING overcommit\n123:M 23 Nov 2026 01:00:04.500 * Ready\n"
ENGINE = "Loading\x1b[0m\n[2026-11-23 01:00:02] ERROR: CUDA is unhappy\n  at line 3\n"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose second replica had been rotated, on a machine of this time zone."""
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("HEADRACE_REDIS_URL", raising=False)
    logs = tmp_path / "demo" / "logs"
    logs.mkdir(parents=True)
    (tmp_path / "demo" / "config.yaml").touch()
    (logs / "learner.log").write_text(LEARNER)
    (logs / "generation-0.log.1").write_text(REPLICA.splitlines(keepends=True)[0])
    (logs / "generation-0.log").write_text("".join(REPLICA.splitlines(keepends=True)[1:]))
    (logs / "redis.log").write_text(REDIS)
    (logs / "sglang-generation-0.log").write_text(ENGINE)
    return tmp_path


def headrace(runs: Path, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["logs", *arguments, "--runs-folder", str(runs)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def objects(runs: Path, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in headrace(runs, "--json", *arguments).stdout.splitlines()]


def test_all_files_are_one_log_in_the_order_of_time(runs: Path) -> None:
    found = objects(runs)
    assert len(found) == 14
    times = [one["time"] for one in found]
    assert times == sorted(times) and times[0] == "2026-11-23T01:00:00.100Z"
    assert found[0]["message"] == "headrace learner: an odd line before any time" and found[0]["level"] == "ERROR"
    services = [one["service"] for one in found]
    assert services.count("engine") == 2 and services.count("redis") == 2
    engine = next(one for one in found if "CUDA" in one["message"])
    assert (engine["level"], engine["message"]) == ("ERROR", "ERROR: CUDA is unhappy\nat line 3")
    assert headrace(runs, "--run", "demo", "-n", "1").stdout == LEARNER.splitlines()[-1] + "\n"


def test_a_ticket_is_followed_through_every_service(runs: Path) -> None:
    lines = headrace(runs, "--ticket", "0-1").stdout.splitlines()
    told = [re.sub(r"^\S+ [A-Z]+ (\w+).* ticket=0-1: ", r"\1: ", line) for line in lines]
    assert told == [
        "learner: issued, with 2 others",
        "generation: leased, for version 1",
        "generation: attempt 1 of 3 failed: no",
        "generation: committed",
        "learner: arrived, with 1 others",
        "learner: trained, with 1 others",
    ]
    assert headrace(runs, "--ticket", "0-1", "--service", "generation-0").stdout.count("\n") == 3
    assert headrace(runs, "--ticket", "0").stdout == ""


def test_the_ledger_says_where_the_ticket_is_now(runs: Path, redis_url: str, client: redis.Redis) -> None:
    client.hset(Keys("demo").ledger, "0-2", "uniform")
    try:
        said = headrace(runs, "--ticket", "0-2", "--redis-url", redis_url).stdout.splitlines()[-1]
        assert said == "ledger: 0-2 is uniform"
        assert objects(runs, "--ticket", "0-9", "--redis-url", redis_url)[-1]["ledger"].startswith("unknown")
        nowhere = headrace(runs, "--ticket", "0-2", "--redis-url", "redis://127.0.0.1:1").stdout
        assert "ledger" not in nowhere and "arrived, uniform" in nowhere
    finally:
        client.delete(Keys("demo").ledger)


def test_levels_services_and_steps(runs: Path) -> None:
    assert {one["level"] for one in objects(runs, "--level", "warning")} == {"WARNING", "ERROR"}
    errors = [one["message"] for one in objects(runs, "--level", "ERROR", "--service", "learner")]
    assert errors[1:] == [
        "the learner failed\nTraceback (most recent call last):\nValueError: no",
        "Traceback (most recent call last):\nValueError: at the top",
    ], "what is indented belongs to its line, and what a dying process prints is an error"
    assert {one["step"] for one in objects(runs, "--step", "1")} == {1}


def test_what_is_written_meanwhile_is_followed(runs: Path) -> None:
    logs = runs / "demo" / "logs"
    follower = LogFollower(logs, LogFilter(ticket="0-1"))
    assert follower.read_new() == []
    with (logs / "learner.log").open("a") as file:
        file.write("2026-11-23T01:01:00.000Z INFO learner run=demo ticket=0-1: stale")
    assert follower.read_new() == [], "not before the line is whole"
    with (logs / "learner.log").open("a") as file:
        file.write(" by 3\n2026-11-23T01:01:00.000Z INFO learner run=demo ticket=0-2: stale\n")
    (logs / "generation-1.log").write_text("2026-11-23T01:00:59.000Z INFO generation ticket=0-1: leased\n")
    assert [line.message for line in follower.read_new()] == ["leased", "stale by 3"]
    (logs / "generation-1.log").write_text("2026-11-23T01:02:00.000Z INFO x ticket=0-1: y\n")
    assert [line.message for line in follower.read_new()] == ["y"], "from the beginning of a file that was replaced"


def test_following_prints_the_last_lines_first(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_then_interrupt(_: float) -> None:
        log = runs / "demo" / "logs" / "learner.log"
        if "new" in log.read_text():
            raise KeyboardInterrupt
        with log.open("a") as file:
            file.write("2026-11-23T01:01:00.000Z INFO learner run=demo: new\n")

    sleeping: Callable[..., None] = write_then_interrupt
    monkeypatch.setattr("headrace.launcher.commands.logs.time.sleep", sleeping)
    lines = headrace(runs, "-f", "-n", "1").stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["trained", "new"]


def test_what_is_not_there_is_refused(runs: Path, tmp_path: Path) -> None:
    assert "there is no log" in headrace(runs, "--run", "nope", code=2).stderr
    assert "expected 1 to 64 letters" in headrace(runs, "--run", "../demo", code=2).stderr
    (tmp_path / "none").mkdir()
    assert "there is no run in" in headrace(tmp_path / "none", code=2).stderr


def test_many_lines_are_not_held_in_memory(runs: Path) -> None:
    assert next(read_logs(runs / "demo" / "logs", LogFilter())).service == "learner"


def test_the_default_run_is_the_only_live_one_else_the_newest(
    runs: Path, redis_url: str, client: redis.Redis, keys: Keys
) -> None:
    """What a killed launcher has left says nothing."""
    live, other = f"{keys.run}-live", f"{keys.run}-other"
    for name in (live, other, f"{keys.run}-killed"):
        (runs / name).mkdir()
        (runs / name / "redis-url").write_text(redis_url)
    assert choose_run(None, runs) == "demo"
    client.set(Keys(live).launcher, "here", ex=60)
    assert choose_run(None, runs) == choose_run(None, runs, redis_url) == live
    assert choose_run("demo", runs) == "demo"
    client.set(Keys(other).launcher, "here", ex=60)
    with pytest.raises(ValueError, match=r"2 runs are live .*: expected --run"):
        choose_run(None, runs)
    client.delete(Keys(live).launcher, Keys(other).launcher)
