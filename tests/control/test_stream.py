"""Server-sent events: every page gets the news at once, and a page that does not read costs only its buffer."""

import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
import redis

from headrace.common.http import limits as http_limits
from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from headrace.control.models.groups import GroupSummary
from headrace.control.models.history import Event
from headrace.control.models.replicas import Replicas
from headrace.control.models.status import Status
from headrace.control.view import event_stream as stream
from headrace.control.view.event_stream import Hub, TooManySubscribers
from tests.support.control_service import Control, a_control
from tests.support.fake_services import until
from tests.support.guard import GUARD_S
from tests.support.seeded_run import group_sample, heartbeat, seed_run, step_rows


@pytest.fixture
def control(redis_url: str, client: redis.Redis, keys: Keys) -> Iterator[Control]:
    seed_run(client, keys)
    with a_control(redis_url, keys) as served:
        yield served


def take(events: Iterator[tuple[str, Any]], *names: str) -> list[Any]:
    """The next event of each name, in that order, past all others."""
    return [next(data for found, data in events if found == name) for name in names]


def test_a_page_gets_the_state_and_then_the_news(control: Control, client: redis.Redis, keys: Keys) -> None:
    with control.events() as events:
        status, replicas = take(events, "status", "replicas")
        assert Status.model_validate(status).step == 40
        assert len(Replicas.model_validate(replicas).replicas) == 2
        client.xadd(keys.history, {"kind": "step", "row": msgspec.json.encode(step_rows(41, 9.0)[-1])})
        client.xadd(keys.history, {"kind": "evaluation", "row": b'{"step": 41, "held_out": 0.5}'})
        client.xadd(keys.samples, {"group": msgspec.json.encode(group_sample(99, 41, 9.0))})
        client.xadd(keys.events, {"kind": "checkpoint", "event": b'{"step": 41}'})
        row, evaluation, group, event = take(events, "step", "evaluation", "group", "event")
        assert row["step"] == 41 and row["at"] == 9.0 and row["sampled_reward_mean"] == pytest.approx(0.9)
        assert row.keys() == control.http.get("/history").json()["steps"].keys()
        assert evaluation["held_out"] == 0.5
        assert GroupSummary.model_validate(group).id == "0-99"
        assert Event.model_validate(event).kind == "checkpoint"
        client.set(keys.replica("generation-2"), encode(heartbeat("generation-2", "http://127.0.0.1:9", 40)), ex=60)
        assert any(len(found["replicas"]) == 3 for found in (take(events, "replicas")[0] for _ in range(5)))


def test_what_was_there_before_is_not_news(control: Control) -> None:
    with control.events() as events:
        assert [next(events)[0] for _ in range(2)] == ["status", "replicas"]
        control.ask("POST", "/pause")
        assert next(events)[0] in ("event", "status")


def test_a_status_that_stays_the_same_is_not_sent_again(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    seed_run(client, keys)
    with a_control(redis_url, keys) as control:
        hub, told = control.monitor.hub, {"looks": 0, "bytes": 0}

        def is_quiet() -> bool:
            if hub.num_published_bytes != told["bytes"]:
                told.update(looks=control.monitor.num_polls, bytes=hub.num_published_bytes)
            return control.monitor.num_polls > told["looks"] + 4

        until(is_quiet, "four looks, two seconds, of which nothing is told")


def test_pages_beyond_the_limit_are_told_to_retry(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.monitor.hub, "_max_subscribers", 1)
    with control.events() as events:
        take(events, "status")
        refusal = control.http.get("/events")
        assert refusal.status_code == 503 and refusal.headers["retry-after"] == "30"
        assert refusal.headers["content-type"] == "application/problem+json"
    until(lambda: control.http.get("/status").is_success and control.monitor.hub.num_subscribers == 0, "it to leave")


def test_a_page_that_leaves_is_forgotten(control: Control) -> None:
    with control.events() as events:
        take(events, "status")
        assert control.monitor.hub.num_subscribers == 1
    until(lambda: control.monitor.hub.num_subscribers == 0, "nobody to follow")


def test_a_page_that_never_reads_is_dropped_and_disconnected(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is there it costs its buffer, and the others are told everything."""
    monkeypatch.setattr(http_limits, "STALL_TIMEOUT_S", 0.5)
    hub, address = control.monitor.hub, urlsplit(control.url)
    part = stream.message("event", b'"' + b"x" * 60_000 + b'"')
    with socket.create_connection((address.hostname, address.port), GUARD_S) as silent, control.events() as events:
        take(events, "status")
        silent.sendall(f"GET /events HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        until(lambda: hub.num_subscribers == 2, "both to follow")
        told = 0
        while hub.num_dropped == 0:
            assert told < 400, "it should have been dropped by now"
            control.loop.call_soon_threadsafe(hub.publish, part)
            take(events, "event")
            told += 1
        assert hub.num_subscribers == 1
        silent.settimeout(GUARD_S)
        with pytest.raises(ConnectionResetError):
            while silent.recv(1 << 20):
                pass
            raise ConnectionResetError  # an end of file after what was in flight: closed as well
        assert control.http.get("/healthz").status_code == 200


def test_the_buffer_of_a_page_is_bounded() -> None:
    hub = Hub(max_subscribers=2)
    slow, other = hub.subscribe(b"first"), hub.subscribe()
    hub.publish(b"x" * (stream.MAX_WAITING_BYTES - 100))
    assert not slow.is_closed
    hub.publish(b"y" * 200)
    assert slow.is_closed and other.is_closed and hub.num_dropped == 2 and hub.num_subscribers == 0
    hub.subscribe()
    hub.subscribe()
    with pytest.raises(TooManySubscribers, match="2 pages"):
        hub.subscribe()


def test_streams_end_when_control_does(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    seed_run(client, keys)
    ended = threading.Event()
    with a_control(redis_url, keys) as control:
        begun = threading.Event()

        def follow() -> None:
            with httpx.stream("GET", f"{control.url}/events", trust_env=False, timeout=GUARD_S) as response:
                for _ in response.iter_raw():
                    begun.set()
            ended.set()

        thread = threading.Thread(target=follow)
        thread.start()
        assert begun.wait(GUARD_S)
    thread.join(GUARD_S)
    assert ended.is_set()
