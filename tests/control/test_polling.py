"""What control serves: the state of the run in Redis, whatever its content."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import redis

from headrace.common.config import OptimizerConfig
from headrace.common.metrics.thresholds import SMOOTHED_STEPS
from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from headrace.control.models.commands import SettingsResponse
from headrace.control.models.groups import GroupDetail, Groups
from headrace.control.models.history import Evaluation, Events, History
from headrace.control.models.replicas import Replicas
from headrace.control.models.status import Status
from tests.support.control_service import Control, a_control
from tests.support.fake_sglang import FakeSglang
from tests.support.seeded_run import group_sample, heartbeat, seed_run, step_rows
from tests.support.shown_episodes import episode_group

WAITS = [{"reason": "waiting_for_groups", "text": "few groups", "for_s": 2.0}]


@pytest.fixture
def control(redis_url: str, client: redis.Redis, keys: Keys) -> Iterator[Control]:
    seed_run(client, keys)
    with a_control(redis_url, keys) as served:
        yield served


def announce(client: redis.Redis, keys: Keys, kind: str, row: dict[str, Any]) -> None:
    client.xadd(keys.history, {"kind": kind, "row": msgspec.json.encode(row)})


def test_the_status_has_the_whole_run(control: Control) -> None:
    status = Status.model_validate(control.http.get("/status").json())
    assert (status.step, status.target_steps, status.weight_version, status.fencing_epoch, status.phase) == (
        40,
        60,
        41,
        1,
        "training",
    )
    assert status.verdict.level == "healthy" and status.verdict.text == "healthy"
    assert {check.level for check in status.checks} == {"healthy"}
    assert status.sampled_reward_mean == pytest.approx(0.9) and status.latest_evaluation
    assert status.latest_evaluation.pass_at["2"] == pytest.approx(0.84)
    assert status.queues.open_tickets == 8 and status.queues.leased_tickets == 5 and status.queues.dead_letters == 1
    assert status.rates.steps_per_hour == pytest.approx(2400) and status.remaining_s == pytest.approx(30)
    assert status.rates.generated_tokens_per_s == pytest.approx(2000)
    assert status.rates.learner_idle_share == pytest.approx(0.2)
    assert (status.counts.trained, status.counts.uniform, status.counts.dead_letters) == (640, 213, 1)
    assert status.replicas.live == status.replicas.running == 2 and status.replicas.advised == 3
    assert status.replicas.launcher == "machine process 1" and status.replicas.desired is None


def test_counts_come_from_the_learner_if_it_answers(
    control: Control, client: redis.Redis, keys: Keys, fake: FakeSglang
) -> None:
    fake.replies["/status"] = 200, {"counts": {"trained": 7, "odd": 1}, "waits": WAITS}
    client.hset(keys.learner, "url", fake.url)
    status = control.wait_for(lambda found: found["counts"]["trained"] == 7, "the learner's counts")
    assert {
        "component": "learner",
        "reason": "waiting_for_groups",
        "text": "few groups for 2 s",
        "for_s": 2.0,
    } in status["waits"]


def test_unread_groups_grow_while_the_learner_is_silent(
    control: Control, client: redis.Redis, keys: Keys, fake: FakeSglang
) -> None:
    assert control.http.get("/status").json()["queues"]["unread_groups"] is None
    length = client.xlen(keys.groups)
    fake.replies["/status"] = 200, {"group_stream_length": length, "unread_groups": 2}
    client.hset(keys.learner, "url", fake.url)
    control.wait_for(lambda found: found["queues"]["unread_groups"] == 2, "the learner's number")
    fake.replies["/status"] = 500, {}
    for _ in range(3):
        client.xadd(keys.groups, {"id": "0-0", "group": b""})
    control.wait_for(lambda found: found["queues"]["unread_groups"] == 5, "the groups that it has not read")


def test_replicas(control: Control, client: redis.Redis, keys: Keys) -> None:
    client.set(keys.replica("odd"), b"\x00not a heartbeat", ex=60)
    control.refresh()
    found = Replicas.model_validate(control.http.get("/replicas").json())
    assert [replica.id for replica in found.replicas] == ["generation-0", "generation-1"]
    first = control.http.get("/replicas/generation-1").json()
    assert first["swap_pauses"] == {
        "count": 1,
        "p50_ms": 51.0,
        "p95_ms": 51.0,
        "latest_ms": 51.0,
        "fetched_bytes": 20_000,
    }
    assert first["versions_behind"] == 0 and first["tokens_per_s"] is None
    client.hset(keys.learner, "weight_version", 44)
    moved = msgspec.structs.replace(heartbeat("generation-1", "http://127.0.0.1:9", 40), tokens_generated=10**6)
    client.set(keys.replica("generation-1"), encode(moved), ex=60)
    client.delete(keys.replica("generation-0"))
    control.refresh()
    found = Replicas.model_validate(control.http.get("/replicas").json())
    assert [replica.id for replica in found.replicas] == ["generation-1"] and found.counts.live == 1
    assert found.replicas[0].versions_behind == 3 and (found.replicas[0].tokens_per_s or 0) > 0
    assert control.http.get("/replicas/generation-0").status_code == 404


def test_history_is_columns_thinned_and_continued(control: Control, client: redis.Redis, keys: Keys) -> None:
    whole = History.model_validate(control.http.get("/history").json())
    assert whole.steps["step"] == list(range(1, 41)) and whole.num_steps == 40
    assert len({len(column) for column in whole.steps.values()}) == 1 and "at" in whole.steps
    assert [evaluation.step for evaluation in whole.evaluations] == [20, 40]
    thinned = control.http.get("/history", params={"max_points": 5}).json()
    assert thinned["steps"]["step"] == [1, 11, 20, 30, 40] or thinned["steps"]["step"] == [1, 11, 21, 30, 40]
    assert control.http.get("/history", params={"max_points": 1}).json()["steps"]["step"] == [40]
    row = step_rows(41, 1.0)[-1] | {"new_metric": 2.5, "text": "no number", "ess": None}
    announce(client, keys, "step", row)
    control.refresh()
    news = control.http.get("/history", params={"after": whole.cursor}).json()
    assert news["steps"]["step"] == [41] and news["steps"]["new_metric"] == [2.5] and news["steps"]["ess"] == [None]
    assert "text" not in news["steps"] and news["evaluations"] == []
    assert control.http.get("/history").json()["steps"]["new_metric"][:2] == [None, None]
    assert control.http.get("/history", params={"after": news["cursor"]}).json()["steps"]["step"] == []


def test_the_logprob_gap_keeps_its_last_value(control: Control, client: redis.Redis, keys: Keys) -> None:
    def check() -> tuple[str, float]:
        control.refresh()
        checks = control.http.get("/status").json()["checks"]
        (found,) = [one for one in checks if one["name"] == "fresh_logprob_gap_rms"]
        return found["level"], found["value"]

    steps = iter(range(31, 60))
    for value in [5.0] * SMOOTHED_STEPS + [None] * 12:
        fresh = {} if value is None else {"fresh_logprob_gap_rms": value}
        announce(client, keys, "step", {"step": next(steps), "fresh_tokens": 0.0, "ess": 0.9, **fresh})
    assert check() == ("critical", 5.0)
    for _ in range(SMOOTHED_STEPS // 2 + 1):
        announce(client, keys, "step", {"step": next(steps), "fresh_logprob_gap_rms": 1e-5})
    assert check() == ("healthy", 1e-5)


def test_a_repeated_step_replaces_later_ones(control: Control, client: redis.Redis, keys: Keys) -> None:
    announce(client, keys, "step", {"step": 31, "sampled_reward_mean": 0.1})
    control.refresh()
    found = control.http.get("/history").json()
    assert found["steps"]["step"] == list(range(1, 32)) and found["steps"]["sampled_reward_mean"][-1] == 0.1
    assert [evaluation["step"] for evaluation in found["evaluations"]] == [20]
    assert control.http.get("/status").json()["sampled_reward_mean"] == 0.1


def test_evaluations(control: Control, client: redis.Redis, keys: Keys) -> None:
    announce(client, keys, "evaluation", {"step": 40, "held_out": 0.9, "pass_at_4": 0.95, "time_s": 5.0})
    control.refresh()
    found = [Evaluation.model_validate(one) for one in control.http.get("/evaluations").json()]
    assert [(one.step, one.is_best) for one in found] == [(20, True), (40, False)]
    assert found[-1].held_out == 0.9 and found[-1].pass_at == {"4": 0.95} and found[-1].at == 5.0


def test_groups_are_listed_and_read_token_by_token(control: Control, client: redis.Redis, keys: Keys) -> None:
    found = Groups.model_validate(control.http.get("/groups", params={"limit": 3}).json())
    assert len(found.groups) == 3 and found.num_kept == 24
    assert found.groups[0].prompt.startswith("Mia has 23 boxes") and found.groups[0].rewards == [1.0, 0.0, 1.0, 0.0]
    for asked in ({"kind": "eval"}, {"state": "uniform"}, {"step": 38}, {"replica": "generation-1"}):
        ((name, value),) = asked.items()
        groups = control.http.get("/groups", params=asked).json()["groups"]
        assert groups and {group[name] for group in groups} == {value}
    detail = GroupDetail.model_validate(control.http.get("/groups/0-1").json())
    rollout = detail.rollouts[1]
    assert len(rollout.tokens) == len(rollout.weight_versions) == len(rollout.behaviour_logprobs) == 10
    assert rollout.proximal_logprobs and rollout.advantage == -0.9 and detail.messages[0]["role"] == "user"
    assert control.http.get("/groups/0-999").status_code == 404
    again = msgspec.structs.replace(group_sample(1, 40, 1.0), state="stale")
    client.xadd(keys.samples, {"group": msgspec.json.encode(again)})
    control.refresh()
    assert control.http.get("/groups", params={"state": "stale"}).json()["groups"][0]["id"] == "0-1"
    assert control.http.get("/groups").json()["num_kept"] == 24


def test_an_episode_is_read_turn_by_turn(control: Control, client: redis.Redis, keys: Keys) -> None:
    sample = episode_group()
    client.xadd(keys.samples, {"group": msgspec.json.encode(sample)})
    control.refresh()
    detail = GroupDetail.model_validate(control.http.get(f"/groups/{sample.id}").json())
    rollout, lost = detail.rollouts
    assert [turn.role for turn in rollout.turns] == ["assistant", "tool"] * 3 + ["assistant"]
    assert "".join(rollout.tokens[rollout.turns[-1].start :]) == "He sells 123 bags.\n#### 123<|im_end|>"
    assert rollout.turns[1].text == sample.rollouts[0].turns[1].text and "408" in rollout.turns[1].text
    assert [(one.origin, one.prompt) for one in rollout.segments] == [("conversation", 0), ("history", 1)]
    assert detail.prompts == sample.prompts and rollout.metrics == {"tool_calls": 3.0, "tool_errors": 0.0}
    assert (lost.finish_reason, lost.failed_episodes, lost.num_omitted_turns) == ("max_turns", 1, 0)


def test_messages_need_no_text(control: Control, client: redis.Redis, keys: Keys) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for prompt in (
        [],
        [{"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"role": "user", "content": [{"type": "text", "text": "?"}]}],
    ):
        sample = msgspec.structs.replace(group_sample(0, 40, 1.0), prompt=prompt)
        client.xadd(keys.samples, {"group": msgspec.json.encode(sample)})
        control.refresh()
        detail = control.http.get(f"/groups/{sample.id}").json()
        assert detail["prompt"] == "" and detail["messages"] == prompt


def test_recent_events_have_a_text(control: Control, client: redis.Redis, keys: Keys) -> None:
    client.xadd(keys.events, {"kind": "redis_lost", "event": b'{"step": 3, "num_reissued": 4}'})
    control.refresh()
    found = Events.model_validate(control.http.get("/events/recent").json()).events
    assert found[0].text == "Redis lost its data after step 3; 4 tickets reissued"
    assert found[1].text == "generation-1 uses weight version 41; paused 51 ms"
    assert [event.kind for event in found] == ["redis_lost", "weight_swap", "weight_swap", "evaluation", "evaluation"]


def test_settings_have_present_values_and_no_secrets(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    seed_run(client, keys)
    config = msgspec.json.decode(client.get(keys.config))
    config["task"]["settings"] = {"api_key": "sesame", "nested": [{"password": "sesame"}], "digits": 2}
    config["generation"]["engine"]["url"] = "http://user:sesame@engine:30000"
    config["generation"]["engine"]["extra_args"] = [
        "--ssl-keyfile-password",
        "sesame",
        "--ssl-keyfile-password=sesame",
        "--log-level",
        "info",
    ]
    client.set(keys.config, msgspec.json.encode(config))
    with a_control(redis_url, keys) as control:
        text = control.http.get("/settings").text
    assert "sesame" not in text
    found = SettingsResponse.model_validate_json(text)
    assert found.settings["optimizer.lr"].value == found.settings["optimizer.lr"].configured == 2e-4
    assert found.settings["optimizer.lr"].description == OptimizerConfig.model_fields["lr"].description
    assert found.config["task"]["settings"]["digits"] == 2 and "redis_url" not in found.config
    assert found.config["generation"]["engine"]["extra_args"][-2:] == ["--log-level", "info"]


@pytest.mark.parametrize(
    ("stream", "fields"),
    [
        ("history", {"kind": "step", "row": b"\xff"}),
        ("history", {"kind": "step", "row": b'{"step": "x"}'}),
        ("history", {"kind": "step", "row": b'{"step": -1e400}'}),
        ("history", {"kind": "step", "row": b"[" * 5000}),
        ("history", {"kind": "evaluation", "row": b'{"step": 50}'}),
        ("history", {"row": b"{}"}),
        ("samples", {"group": b'{"id": 3}'}),
        ("samples", {"id": "x"}),
        ("events", {"kind": b"\xff", "event": b"{"}),
        ("events", {"kind": "weight_swap", "event": b'{"replica": [1], "pause_ms": "x", "bytes": -1e3}'}),
        ("events", {"event": b'{"a": 123456789012345678901234567890}'}),
    ],
)
def test_invalid_content_in_redis_is_skipped(
    control: Control, client: redis.Redis, keys: Keys, stream: str, fields: dict[Any, Any]
) -> None:
    client.xadd(getattr(keys, stream), fields)
    client.hset(keys.learner, mapping={"reason": b"\xff" * 5000, b"\xfe": "x", "step": "many"})
    client.hset(keys.control, mapping={"settings": b"{", "desired_replicas": "-1", "checkpoints": "x"})
    client.set(keys.epoch, "x")
    client.set(keys.config, b'{"model": 1}')
    announce(client, keys, "step", {"step": 41})
    control.refresh()
    assert control.http.get("/status").json()["settings_version"] == 0
    assert control.http.get("/history").json()["steps"]["step"][-1] == 41
    for path in ("/replicas", "/groups", "/events/recent", "/settings", "/evaluations"):
        assert control.http.get(path).status_code == 200


def test_an_empty_run_is_waiting(redis_url: str, keys: Keys) -> None:
    with a_control(redis_url, keys) as control:
        status = Status.model_validate(control.http.get("/status").json())
        assert status.phase == "loading the model" and status.verdict.level == "waiting"
        assert [status.sampled_reward_mean, status.latest_evaluation, status.remaining_s, status.wall_s] == [None] * 4
        assert control.http.get("/history").json() == {
            "cursor": "0-0",
            "steps": {"step": []},
            "evaluations": [],
            "num_steps": 0,
        }
        for path in ("/groups", "/events/recent", "/evaluations", "/replicas", "/settings"):
            assert control.http.get(path).status_code == 200
