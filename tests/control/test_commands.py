"""Commands: they are stored in Redis, with an event that names the caller, and outlive control."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from headrace.common.wire.desired_state import DesiredState, Launcher, Settings, parse_desired_state
from headrace.control.http import drain
from headrace.control.models.commands import CommandAccepted, SettingsResponse
from tests.support.control_service import TOKEN, Control, a_control
from tests.support.fake_sglang import FakeSglang
from tests.support.seeded_run import heartbeat, seed_run

LR = {"settings": {"optimizer.lr": 1e-5}}


@pytest.fixture
def control(redis_url: str, client: redis.Redis, keys: Keys) -> Iterator[Control]:
    seed_run(client, keys)
    with a_control(redis_url, keys) as served:
        yield served


def desired_state(client: redis.Redis, keys: Keys) -> DesiredState:
    return parse_desired_state(client.hgetall(keys.control))


def latest_event(control: Control) -> dict[str, Any]:
    control.refresh()
    found: dict[str, Any] = control.http.get("/events/recent", params={"limit": 1}).json()["events"][0]
    return found


def test_commands_stay_until_they_are_withdrawn(control: Control, client: redis.Redis, keys: Keys) -> None:
    done = CommandAccepted.model_validate(control.ask("POST", "/pause").json())
    assert done.status and done.status.is_paused and done.status.verdict.text == "paused on request"
    assert desired_state(client, keys).is_paused
    assert control.ask("POST", "/resume").json()["status"]["is_paused"] is False
    assert not desired_state(client, keys).is_paused
    for expected in (1, 2):
        assert control.ask("POST", "/checkpoint").status_code == control.ask("POST", "/evaluations").status_code == 200
        assert desired_state(client, keys).checkpoints == desired_state(client, keys).evaluations == expected
    stopping = control.ask("POST", "/stop").json()["status"]
    assert stopping["is_stopping"] and stopping["verdict"]["text"].startswith("stopping on request")
    assert desired_state(client, keys).is_stopping


def test_a_command_is_recorded_with_its_caller(control: Control) -> None:
    control.ask("POST", "/pause", headers={"user-agent": "curl/8" + "x" * 500, "x-forwarded-for": "6.6.6.6"})
    event = latest_event(control)
    assert event["kind"] == "command" and event["data"]["command"] == "pause"
    assert event["data"]["by"].startswith("127.0.0.1 (") and len(event["data"]["by"]) < 100
    assert event["text"].startswith("command: pause, by 127.0.0.1")
    assert TOKEN not in str(event)


def test_a_replica_target_needs_a_launcher(control: Control, client: redis.Redis, keys: Keys) -> None:
    done = control.ask("PUT", "/replicas/desired", json={"replicas": 3}).json()
    assert desired_state(client, keys).desired_replicas == done["status"]["replicas"]["desired"] == 3
    assert latest_event(control)["data"]["replicas"] == 3
    for refused in (-1, 65, "x", 1.5, True):
        assert control.ask("PUT", "/replicas/desired", json={"replicas": refused}).status_code == 422
    client.set(keys.launcher, str(Launcher("machine process 1", 3)))
    control.refresh()
    refusal = control.ask("PUT", "/replicas/desired", json={"replicas": 4})
    assert refusal.status_code == 422 and "4 replicas: the run's launcher has GPUs for 3" in refusal.json()["detail"]
    assert desired_state(client, keys).desired_replicas == 3
    client.delete(keys.launcher)
    control.refresh()
    refusal = control.ask("PUT", "/replicas/desired", json={"replicas": 2})
    assert refusal.status_code == 409 and "no launcher" in refusal.json()["detail"]
    assert control.ask("PUT", "/replicas/desired", json={"replicas": None}).status_code == 200
    assert desired_state(client, keys).desired_replicas is None


def test_settings_are_validated_versioned_and_recorded(control: Control, client: redis.Redis, keys: Keys) -> None:
    answer = SettingsResponse.model_validate(control.ask("PATCH", "/settings", json=LR | {"version": 0}).json())
    assert answer.version == 1 and answer.settings["optimizer.lr"].value == 1e-5
    assert answer.applied_version == 0 and answer.settings["optimizer.lr"].configured == 2e-4
    assert latest_event(control)["data"]["changes"] == {"optimizer.lr": 1e-5}
    assert latest_event(control)["kind"] == "settings_requested"
    client.hset(keys.learner, "settings_version", 1)
    change = {"settings": {"learner.max_staleness": 1, "optimizer.lr": None}}
    answer = SettingsResponse.model_validate(control.ask("PATCH", "/settings", json=change).json())
    assert (answer.version, answer.applied_version) == (2, 1)
    assert desired_state(client, keys).settings == Settings(2, {"learner.max_staleness": 1})
    overtaken = control.ask("PATCH", "/settings", json=LR | {"version": 1})
    assert overtaken.status_code == 409 and "have version 2, not 1" in overtaken.json()["detail"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optimizer.lr": -1}, "optimizer.lr is -1"),
        ({"optimizer.lr": 0, "learner.max_staleness": 1}, "optimizer.lr is 0"),
        ({"learner.steps": 5}, "learner.steps cannot change"),
        ({"learner.steps": None}, "learner.steps cannot change"),
        ({"optimizer.lr": 10**400}, "optimizer.lr"),
        ({"learner.max_staleness": 1.5}, "learner.max_staleness"),
        ({"\ud800": 1}, "cannot change"),
        ({}, "settings"),
        ({"optimizer.lr": "1e-5"}, "settings.optimizer.lr"),
        ({"optimizer.lr": True}, "settings.optimizer.lr"),
    ],
)
def test_an_invalid_change_changes_nothing(
    control: Control, client: redis.Redis, keys: Keys, change: dict[str, Any], told: str
) -> None:
    body = json.dumps({"settings": change})
    answer = control.ask("PATCH", "/settings", content=body.encode(), headers={"content-type": "application/json"})
    assert answer.status_code == 422 and told in answer.json()["detail"]
    assert desired_state(client, keys).settings.version == 0


def test_concurrent_changes_are_all_applied(control: Control, client: redis.Redis, keys: Keys) -> None:
    names = ["optimizer.lr", "sampling.temperature", "actor.eps_clip", "actor.eps_clip_higher"]
    answers: list[int] = []

    def change(name: str) -> None:
        answers.append(control.ask("PATCH", "/settings", json={"settings": {name: 0.125}}).status_code)

    threads = [threading.Thread(target=change, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 4
    assert desired_state(client, keys).settings == Settings(4, dict.fromkeys(names, 0.125))


def test_a_replica_is_drained_at_its_own_address(
    control: Control, client: redis.Redis, keys: Keys, fake: FakeSglang
) -> None:
    fake.replies["/drain"] = 200, {}
    client.set(keys.replica("generation-1"), encode(heartbeat("generation-1", fake.url, 40)), ex=60)
    control.refresh()
    assert control.ask("POST", "/replicas/generation-1/drain").status_code == 200
    assert fake.paths == ["/drain"]
    assert latest_event(control)["data"] == latest_event(control)["data"] | {
        "command": "drain",
        "replica": "generation-1",
    }
    fake.replies["/drain"] = 500, {}
    refusal = control.ask("POST", "/replicas/generation-1/drain")
    assert refusal.status_code == 503 and refusal.json()["detail"] == "the replica responded with HTTP 500"
    fake.hanging.add("/drain")
    assert control.ask("POST", "/replicas/nobody/drain").status_code == 404


def test_a_drain_has_a_deadline(
    control: Control, client: redis.Redis, keys: Keys, fake: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "DRAIN_DEADLINE_S", 0.1)
    fake.hanging.add("/drain")
    client.set(keys.replica("generation-1"), encode(heartbeat("generation-1", fake.url, 40)), ex=60)
    control.refresh()
    refusal = control.ask("POST", "/replicas/generation-1/drain")
    assert refusal.status_code == 503 and refusal.headers["retry-after"] == "1"
    assert TOKEN not in refusal.text


def test_commands_survive_control(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    seed_run(client, keys)
    with a_control(redis_url, keys) as control:
        assert control.ask("PATCH", "/settings", json=LR).status_code == 200
        assert control.ask("POST", "/pause").status_code == 200
    with a_control(redis_url, keys) as control:
        assert control.http.get("/settings").json()["settings"]["optimizer.lr"]["value"] == 1e-5
        assert control.http.get("/status").json()["is_paused"] is True
        assert msgspec.json.decode(client.hget(keys.control, "settings") or b"")["version"] == 1
