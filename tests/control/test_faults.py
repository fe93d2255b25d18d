"""Control detects and survives failures of Redis and of the learner."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import redis

from headrace.common.config import load_recipe
from headrace.common.http.addresses import bearer_header, free_port
from headrace.common.redis.keys import Keys
from headrace.control.assembly import running_app
from headrace.control.polling import learner_probe
from headrace.launcher.run.redis_server import launch_redis, redis_url_at, start_redis, wait_for_redis
from tests.support.control_service import TOKEN, a_control
from tests.support.fake_services import ROOT, until
from tests.support.fake_sglang import FakeSglang
from tests.support.guard import GUARD_S
from tests.support.seeded_run import RECIPE, seed_run, step_rows

KEYS = Keys("test-control-faults")


def test_the_last_view_stays_while_redis_is_unavailable(tmp_path: Path) -> None:
    service, url = start_redis(tmp_path, tmp_path / "redis.log")
    try:
        with redis.Redis.from_url(url) as client:
            seed_run(client, KEYS)
        with a_control(url, KEYS) as control:
            service.kill()
            away = control.wait_for(lambda found: found["verdict"]["level"] == "critical", "Redis missed")
            assert away["verdict"]["text"] == "Redis does not answer; the data shown is from before"
            assert away["step"] == 40 and control.http.get("/history").json()["num_steps"] == 40
            again = control.status()
            assert again["verdict"]["since_at"] == away["verdict"]["since_at"] and again["at"] > away["at"]
            for method, path in (("POST", "/pause"), ("PATCH", "/settings")):
                refusal = control.ask(method, path, json={"settings": {"optimizer.lr": 1e-5}})
                assert refusal.status_code == 503 and refusal.headers["retry-after"] == "1"
                assert refusal.json()["detail"] == "Redis does not answer; try again"
            port = int(url.rpartition(":")[2])
            service = launch_redis(tmp_path, tmp_path / "redis.log", port)
            wait_for_redis(service, url)
            control.wait_for(lambda found: found["verdict"]["text"] == "healthy", "Redis back")
            with redis.Redis.from_url(url) as client:
                client.xadd(KEYS.history, {"kind": "step", "row": json.dumps(step_rows(41, 1.0)[-1])})
            assert control.ask("POST", "/pause").status_code == 200
            control.refresh()
            assert control.http.get("/history").json()["num_steps"] == 41
    finally:
        service.kill()


def test_a_frozen_redis_blocks_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.control.http import command_writer
    from headrace.control.view import run_monitor

    monkeypatch.setattr(run_monitor, "POLL_DEADLINE_S", 1.0)
    monkeypatch.setattr(command_writer, "COMMAND_DEADLINE_S", 0.3)
    service, url = start_redis(tmp_path, tmp_path / "redis.log")
    try:
        with redis.Redis.from_url(url) as client:
            seed_run(client, KEYS)
        with a_control(url, KEYS) as control:
            service.process.send_signal(signal.SIGSTOP)
            control.wait_for(lambda found: found["verdict"]["text"].startswith("Redis does not"), "Redis missed")
            assert control.ask("POST", "/pause").status_code == 503
            service.process.send_signal(signal.SIGCONT)
            control.wait_for(lambda found: found["verdict"]["level"] in ("healthy", "waiting"), "Redis back")
    finally:
        service.kill()


def test_a_silent_learner_is_detected(
    redis_url: str, client: redis.Redis, keys: Keys, fake: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has written in Redis looks as well as ever."""
    from headrace.control.verdict import run_checks

    monkeypatch.setattr(run_checks, "LEARNER_SLOW_S", 1.0)
    monkeypatch.setattr(run_checks, "LEARNER_SILENT_S", 2.0)
    monkeypatch.setattr(learner_probe, "PROBE_INTERVAL_S", 0.05)
    monkeypatch.setattr(learner_probe, "PROBE_TIMEOUT_S", 0.5)
    fake.replies["/status"] = 200, {"counts": {"trained": 5}}
    seed_run(client, keys, learner_url=fake.url)
    with a_control(redis_url, keys) as control:
        control.wait_for(lambda found: found["counts"]["trained"] == 5, "the learner's answer")
        control.wait_for(lambda found: found["verdict"]["text"] == "healthy", "it to be prompt")
        fake.hanging.add("/status")
        control.wait_for(lambda found: found["verdict"]["text"] == "the learner does not answer", "its silence")
        assert control.status()["counts"]["trained"] == 5
        fake.hanging.clear()
        control.wait_for(lambda found: found["verdict"]["text"] == "healthy", "its answer")
        fake.replies["/status"] = 500, {}
        control.wait_for(lambda found: found["verdict"]["text"] == "the learner does not answer", "its refusal")
        client.hset(keys.learner, "phase", "finished")
        control.wait_for(lambda found: found["verdict"]["level"] == "ended", "its end")


def test_control_exits_instead_of_serving_a_stale_view(
    redis_url: str, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_run(client, keys)

    async def poll() -> None:
        raise RuntimeError("a bug of ours")

    async def scenario() -> None:
        config = load_recipe(RECIPE, []).config
        async with running_app(keys.run, config, redis_url, TOKEN, require_token_for_reads=False) as (_, monitor):
            monkeypatch.setattr(monitor.poller, "poll", poll)
            await asyncio.wait_for(asyncio.Event().wait(), GUARD_S)

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(scenario())
    assert raised.group_contains(RuntimeError, match="a bug of ours")


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "file:///etc/passwd", "http://[", "x" * 600, "http://a b"])
def test_a_learner_with_an_invalid_address_is_silent(redis_url: str, client: redis.Redis, keys: Keys, url: str) -> None:
    seed_run(client, keys, learner_url=url)
    with a_control(redis_url, keys) as control:
        until(lambda: control.monitor.probe.silent_s > 1.5, "a probe")
        assert not control.monitor.probe.is_answering and control.http.get("/status").status_code == 200


def test_the_process_serves_a_run_and_exits_on_sigterm(
    redis_url: str, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    """It waits for the run and for the token, as a replica does, and never tells the token."""
    port, token_file, log = free_port(), tmp_path / "token", tmp_path / "log"
    place = ["--run", keys.run, "--token-file", str(token_file), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "headrace.control", *place],
            cwd=ROOT,
            env=os.environ | {"HEADRACE_REDIS_URL": redis_url},
            stderr=output,
        )
    try:
        seed_run(client, keys)
        token_file.write_text(TOKEN)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=GUARD_S) as http:

            def is_up() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return http.get("/healthz").is_success
                except httpx.TransportError:
                    return False

            until(is_up, "control")
            assert http.get("/status").json()["step"] == 40
            assert http.post("/pause", headers=bearer_header(TOKEN)).status_code == 200
            with http.stream("GET", "/events") as stream:
                parts = stream.iter_raw()
                next(parts)
                process.send_signal(signal.SIGTERM)
                for _ in parts:
                    pass
        assert process.wait(GUARD_S) == 0
    finally:
        process.kill()
    assert TOKEN not in log.read_text() and f"run {keys.run} at http://127.0.0.1:{port}" in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--redis-url", "", "--token-file", "x"], "no Redis: expected the variable HEADRACE_REDIS_URL"),
        (["--redis-url", redis_url_at(1)], "no token: expected the variable HEADRACE_TOKEN or --token-file"),
        (["--redis-url", redis_url_at(1), "--token-file", "x", "--run", "../x"], "run '../x': expected 1 to 64"),
    ],
)
def test_an_error_at_start_is_one_line(arguments: list[str], told: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    command = [sys.executable, "-m", "headrace.control", *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=GUARD_S)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and line.startswith(f"headrace control: {told}")
