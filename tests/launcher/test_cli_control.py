"""The commands that look at a run and steer it, against the real control service on a run that stands in Redis."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
import redis
from typer.testing import CliRunner

from headrace.common.http.addresses import free_port
from headrace.common.redis.keys import Keys
from headrace.common.wire import DecidedState, FinishReason, SegmentOrigin, TicketKind
from headrace.common.wire.desired_state import parse_desired_state
from headrace.control.http.page import PAGE
from headrace.launcher.__main__ import app
from headrace.launcher.commands import observe
from headrace.launcher.commands.logs import Level
from headrace.launcher.run.control_client import ControlClient
from headrace.launcher.run.errors import NotRunning
from headrace.launcher.run.log_files import LEVELS
from headrace.launcher.terminal.group_text import ENDS, GAPS, ORIGINS, group_text, spans
from tests.support.control_service import TOKEN, Control, a_control
from tests.support.fake_sglang import FakeSglang
from tests.support.seeded_run import seed_run
from tests.support.shown_episodes import episode_group

Result = Any
Command = Callable[..., Result]


@pytest.fixture
def control(redis_url: str, client: redis.Redis, keys: Keys, fake: FakeSglang) -> Iterator[Control]:
    """Its replicas are a server that takes whatever it is told."""
    fake.replies["/drain"] = (200, {})
    seed_run(client, keys, replica_url=fake.url)
    with a_control(redis_url, keys) as served:
        yield served


@pytest.fixture
def runs(tmp_path: Path, keys: Keys, control: Control) -> Path:
    """What `headrace up` keeps in the run's folder."""
    folder = tmp_path / "runs" / keys.run
    folder.mkdir(parents=True)
    (folder / "token").write_text(TOKEN)
    (folder / "control-url").write_text(control.url)
    return folder.parent


@pytest.fixture
def headrace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command of this process; fails unless it ends with `code`."""
    for name in ("HEADRACE_TOKEN", "HEADRACE_URL", "HEADRACE_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str, code: int = 0, runs: Path = tmp_path / "runs", **environment: str) -> Result:
        result = CliRunner().invoke(app, [*arguments, "--runs-folder", str(runs)], env=environment)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call


def error(result: Result) -> str:
    """The one line."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("headrace: ") and not result.stdout
    return str(line.removeprefix("headrace: "))


def answer(result: Result) -> Any:
    assert not result.stderr
    return json.loads(result.stdout)


def test_status_says_the_verdict_first(headrace: Command, runs: Path, keys: Keys, control: Control) -> None:
    lines = headrace("status").stdout.splitlines()
    assert lines[0].startswith(f"{keys.run}: healthy (for ")
    assert any(line.startswith("step      40 of 60, weight version 41, training") for line in lines)
    assert any("2 of 2 running, no target set, 3 advised: the learner waits 23%" in line for line in lines)
    found = answer(headrace("status", "--json"))
    assert (found["run"], found["step"], found["verdict"]["level"]) == (keys.run, 40, "healthy")
    control.ask("POST", "/pause")
    first, advice, *rest = headrace("status", "--run", keys.run).stdout.splitlines()
    assert "paused on request" in first and advice.startswith("  → ")
    assert not any("commands: " in line for line in rest), "what the verdict says is not said twice"


def test_watching_tells_what_changes_until_the_run_ends(
    headrace: Command, runs: Path, keys: Keys, control: Control, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While control is away it says so, and goes on."""
    here, looks = runs / keys.run / "control-url", iter(range(10))

    def next_look(_: float) -> None:
        match next(looks):
            case 1:
                monkeypatch.setattr(ControlClient, "get", away)
            case 2:
                monkeypatch.setattr(ControlClient, "get", get)
                client.hset(keys.learner, mapping={"phase": "finished", "step": 60})
                control.refresh()

    def away(*_: object) -> Any:
        raise NotRunning("control does not answer")

    get = ControlClient.get
    monkeypatch.setattr("headrace.launcher.commands.observe.time", SimpleNamespace(sleep=next_look))
    assert here.exists()
    first, gone, last = headrace("status", "--watch").stdout.splitlines()
    assert "step 40 of 60, training; " in first and "healthy" in first
    assert gone == "control does not answer" and "the run is complete: 60 steps" in last


def test_replicas_groups_and_evaluations(headrace: Command, runs: Path, keys: Keys) -> None:
    rows = headrace("replicas").stdout.splitlines()
    assert rows[1].split()[:6] == ["generation-0", "running", "41", "0", "4", "480"] and rows[-1] == "2 replicas"
    assert [one["id"] for one in answer(headrace("replicas", "--json"))["replicas"]] == ["generation-0", "generation-1"]
    stated = headrace("groups", "--state", "uniform", "--replica", "generation-1", "--limit", "2").stdout.splitlines()
    assert len(stated) == 4 and all(" uniform " in row and " generation-1 " in row for row in stated[1:3])
    assert {one["kind"] for one in answer(headrace("groups", "--kind", "eval", "--json"))["groups"]} == {"eval"}
    text = headrace("groups", "0-0").stdout
    assert "ticket 0-0, train, trained at step 40" in text and "user: Mia has 0 boxes" in text
    assert "1. reward 1.00, advantage +0.90, weight versions 39 (5 tokens), 40 (5), 10 tokens, cut off\n" in text
    assert "\n   She has 3 boxes of 4, so 12.\n" in text
    assert answer(headrace("groups", "0-0", "--json"))["rollouts"][0]["weight_versions"][0] == 39
    assert headrace("evaluations").stdout.splitlines()[-1] == "2 evaluations"
    assert [one["step"] for one in answer(headrace("evaluations", "--json"))] == [20, 40]


def test_orders_reach_redis(headrace: Command, runs: Path, keys: Keys, client: redis.Redis, fake: FakeSglang) -> None:
    def standing() -> Any:
        return parse_desired_state(client.hgetall(keys.control))

    assert headrace("pause").stdout == f"run {keys.run}: paused after the step in progress\n"
    assert standing().is_paused
    assert answer(headrace("resume", "--json"))["status"]["is_paused"] is False and not standing().is_paused
    headrace("checkpoint")
    assert standing().checkpoints == 1
    headrace("evaluations", "--now")
    assert standing().evaluations == 1
    assert "target set to 0 replicas; at 0 generation is paused" in headrace("scale", "0").stdout
    assert standing().desired_replicas == 0
    assert answer(headrace("scale", "3", "--json")) == {
        "run": keys.run,
        "replicas": 3,
        "text": f"run {keys.run}: target set to 3 replicas",
    }
    assert standing().desired_replicas == 3
    assert headrace("scale", "--clear").stdout == (
        f"run {keys.run}: target cleared; the configured number applies, or the learner's advice\n"
    )
    assert standing().desired_replicas is None
    assert "finishes or hands back its tickets" in headrace("drain", "generation-1").stdout
    assert "/drain" in [path for path, _ in fake.calls]
    assert "with a checkpoint" in headrace("stop").stdout and standing().is_stopping


def test_settings_are_shown_and_changed(headrace: Command, runs: Path, keys: Keys, client: redis.Redis) -> None:
    assert headrace("settings").stdout.splitlines()[-1] == "as configured"
    lines = headrace("settings", "optimizer.lr=1e-5", "learner.max_staleness=3").stdout.splitlines()
    assert any(line.split()[:4] == ["optimizer.lr", "1e-05", "configured", "0.0002"] for line in lines)
    assert lines[-1] == "version 1, applied from the learner's next step on"
    values = parse_desired_state(client.hgetall(keys.control)).settings.values
    assert values == {"optimizer.lr": 1e-5, "learner.max_staleness": 3}
    found = answer(headrace("settings", "--reset", "optimizer.lr", "--json"))
    assert found["version"] == 2 and found["settings"]["optimizer.lr"]["value"] == 0.0002


@pytest.mark.parametrize(
    "change",
    [*(f"optimizer.lr{end}" for end in ("", "=", "=fast", "=true", "=yes", "='1'")), "learner.max_staleness=01", "=1"],
)
def test_what_is_no_change_is_refused_at_once(headrace: Command, change: str) -> None:
    assert error(headrace("settings", change, code=2)).startswith(f"{change!r}: expected section.name=number")


def test_what_control_refuses_is_one_line(headrace: Command, runs: Path, keys: Keys) -> None:
    assert "cannot change while the run is live" in error(headrace("settings", "optimizer.betas=1", code=2))
    assert "no live replica has this id" in error(headrace("drain", "nobody", code=2))
    assert "no such group" in error(headrace("groups", "0-12345", code=2))
    assert "'65' replicas: expected a number from 0 to 64" in error(headrace("scale", "65", code=2))
    (runs / keys.run / "token").write_text("another")
    refused = error(headrace("pause", code=2))
    assert "token" in refused and "HEADRACE_TOKEN" in refused and "another" not in refused
    assert headrace("pause", HEADRACE_TOKEN=f" {TOKEN}\n").stdout


def test_a_replica_that_does_not_obey_is_a_failure(headrace: Command, runs: Path, fake: FakeSglang) -> None:
    fake.replies["/drain"] = (500, {})
    assert "replica" in error(headrace("drain", "generation-0", code=1))


def test_nothing_that_runs_is_3(headrace: Command, runs: Path, keys: Keys, control: Control, tmp_path: Path) -> None:
    empty = tmp_path / "none"
    empty.mkdir()
    assert error(headrace("status", runs=empty, code=3)) == f"no run is live in {empty}; headrace up starts one"
    assert f"run 'demo' is not live in {runs}" in error(headrace("pause", "--run", "demo", code=3))
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert f"control does not answer at {nowhere}" in error(headrace("status", "--url", nowhere, code=3))
    (runs / keys.run / "control-url").write_text(nowhere)
    assert f"control does not answer at {nowhere}" in error(headrace("status", code=3))
    assert "is not the URL of a control service" in error(headrace("status", "--url", "127.0.0.1", code=2))
    assert "expected 1 to 64 letters" in error(headrace("status", "--run", "../x", code=2))
    assert headrace("status", "--url", control.url).stdout, "a URL needs no folder"
    assert f"is of run {keys.run!r}" in error(headrace("stop", "--url", control.url, "--run", "demo", code=2))


def test_something_else_at_the_url_is_no_control(headrace: Command, fake: FakeSglang) -> None:
    fake.replies["/status"] = (200, {"status": "ok"})
    assert (
        error(headrace("stop", "--url", fake.url, code=3))
        == f"the server at {fake.url} is not a Headrace control service"
    )
    assert "/stop" not in [path for path, _ in fake.calls]


def test_a_note_that_a_killed_launcher_left_leads_to_no_other_run(
    headrace: Command, runs: Path, keys: Keys, control: Control, client: redis.Redis
) -> None:
    """Its port may be another run's by now."""
    (runs / "earlier").mkdir()
    (runs / "earlier" / "control-url").write_text(control.url)
    assert "run 'earlier' is not live" in error(headrace("stop", "--run", "earlier", code=3))
    assert not parse_desired_state(client.hgetall(keys.control)).is_stopping
    assert keys.run in headrace("status").stdout.splitlines()[0], "and of two notes one is true"


def test_of_several_runs_one_must_be_named(headrace: Command, runs: Path, keys: Keys, redis_url: str) -> None:
    other = Keys(f"{keys.run}-b")
    with redis.Redis.from_url(redis_url) as client:
        seed_run(client, other)
    with a_control(redis_url, other) as second:
        (runs / other.run).mkdir()
        (runs / other.run / "control-url").write_text(second.url)
        assert error(headrace("status", code=2)) == f"2 runs are live ({keys.run}, {other.run}): expected --run"
        assert answer(headrace("status", "--run", other.run, "--json"))["run"] == other.run
        assert answer(headrace("status", "--json", HEADRACE_URL=second.url))["run"] == other.run


def test_the_shell_completes_names_of_runs(headrace: Command, tmp_path: Path) -> None:
    for name in ("demo", "demo-2", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    line = f"headrace audit --runs-folder {tmp_path / 'runs'} --run de"
    environment = {"_HEADRACE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": "5"}
    result = CliRunner().invoke(app, [], prog_name="headrace", env=environment)
    assert result.stdout.split() == ["demo", "demo-2"]


def test_a_token_is_coloured_by_how_far_learner_and_engine_are_apart() -> None:
    rollout: dict[str, Any] = {"reward": 1.0, "advantage": None, "finish_reason": "stop", "text": "abc"}
    rollout |= {
        "weight_versions": [3, 3, 4],
        "tokens": ["a", "b\x1b[2J", "c"],
        "behaviour_logprobs": [-1.0, -1.0, -1.0],
        "turns": [],
        "metrics": {},
        "failed_episodes": 0,
    }
    group: dict[str, Any] = {"id": "0-1", "kind": "train", "state": "trained", "step": 4, "issued_step": 3}
    group |= {"replica": "g", "rewards": [], "staleness": 1, "num_omitted": 0}
    group |= {"messages": [{"role": "user", "content": "\x1b]0;hi\x07"}]}
    text = group_text(group | {"rollouts": [rollout | {"proximal_logprobs": [-1.0, -1.1, -3.0]}]})
    assert "\x1b" not in text.plain and "\x07" not in text.plain
    styled = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert (styled[-2], styled[-1]) == (("b�[2J", GAPS[2][1]), ("c", GAPS[4][1]))
    assert spans([3, 3, 4]) == "3 (2 tokens), 4 (1)" and spans([3]) == "3"


def test_an_episode_is_printed_as_a_conversation(
    headrace: Command, runs: Path, client: redis.Redis, keys: Keys, control: Control
) -> None:
    sample = episode_group()
    client.xadd(keys.samples, {"group": msgspec.json.encode(sample)})
    control.refresh()
    shown = headrace("groups", sample.id).stdout
    roles = [
        line.split()[0] for line in shown.splitlines() if re.match(r"   (assistant|tool) \(|   ────|   prompt:", line)
    ]
    solved, lost = ["assistant", "tool"] * 2, ["assistant", "tool", "assistant"]
    assert roles == [*solved, "────", "prompt:", "assistant", "tool", "assistant", *lost]
    assert "──── history rewritten by the agent ────" in shown and "Summary: 17 * 24 = 408" in shown
    assert "1. reward 1.00, tool_calls 3, tool_errors 0, advantage +0.71, weight versions 41 (" in shown
    assert "4.04 s in the model, 0.13 s in the environment" in shown
    assert "failed episodes before it: 1, ended by the limit of turns" in shown


def test_every_reason_has_words() -> None:
    """In the terminal, in the report and on the page."""
    assert set(ORIGINS) == set(get_args(SegmentOrigin)) and set(ENDS) == set(get_args(FinishReason))
    for name, words in (("conversation.js", ORIGINS), ("rollout_view.js", ENDS)):
        script = (PAGE / name).read_text()
        assert all(f"{word}: " in script for word, text in words.items() if text), name


def test_the_choices_of_options_are_the_protocols() -> None:
    """They are written down once more so that a command starts without the protocol's imports."""
    assert tuple(observe.State) == get_args(DecidedState) and tuple(observe.Kind) == get_args(TicketKind)
    assert tuple(level.name for level in Level) == LEVELS


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"headrace {version('headrace')}\n"


def test_the_command_starts_without_heavy_imports() -> None:
    """Every `headrace` command pays for what `__main__` imports."""
    script = "import sys, headrace.launcher.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"fastapi", "httpx", "numpy", "pydantic", "redis", "torch"} & set(loaded)


def test_settings_are_set_or_reset(headrace: Command) -> None:
    refused = error(headrace("settings", "optimizer.lr=1e-5", "--reset", "optimizer.lr", code=2))
    assert refused == "optimizer.lr: expected either a new value or --reset"


@pytest.mark.parametrize("arguments", [(), ("3", "--clear")])
def test_scale_takes_a_number_or_clear(headrace: Command, arguments: tuple[str, ...]) -> None:
    assert "expected either a number or --clear" in error(headrace("scale", *arguments, code=2))


def test_no_help_needs_a_run() -> None:
    for command in ("status", "groups", "settings", "logs", "report", "scale"):
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0 and "--json" in result.stdout
