"""What a caller may take of any service: the learner's, a replica's and control's HTTP sides, as they serve."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from headrace.common.config import load_recipe
from headrace.common.http import limits as http_limits
from headrace.common.http.addresses import listen, socket_url
from headrace.common.http.service import serve_in_loop, serve_in_thread
from headrace.common.process.waiting import Waits
from headrace.common.redis.keys import Keys
from headrace.generation.assembly import assemble_replica
from headrace.generation.http_api import make_app as replica_app
from headrace.learner.reporting.http_api import make_app as learner_app
from headrace.learner.steering.switches import Switches
from tests.support.control_service import TOKEN, a_control
from tests.support.guard import GUARD_S
from tests.support.seeded_run import RECIPE, seed_run

NOBODY = "http://127.0.0.1:1"


@contextlib.contextmanager
def a_learner(redis_url: str, folder: Path) -> Iterator[str]:
    sock = listen("127.0.0.1", 0)
    with serve_in_thread(learner_app(folder, lambda: {"step": 1}, Switches(), TOKEN), sock):
        yield socket_url(sock)


@contextlib.contextmanager
def a_replica(redis_url: str, folder: Path) -> Iterator[str]:
    """It takes no tickets."""
    config = load_recipe(RECIPE, [f"generation.engine.url={NOBODY}"]).config
    sock, is_over, is_up = listen("127.0.0.1", 0), threading.Event(), threading.Event()

    async def serve() -> None:
        parts = assemble_replica(config, Keys("test-http-limits"), redis_url, TOKEN, "a", NOBODY, folder, Waits())
        async with parts as replica, serve_in_loop(replica_app(replica, TOKEN), sock):
            is_up.set()
            await asyncio.to_thread(is_over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="replica")
    thread.start()
    try:
        assert is_up.wait(GUARD_S)
        yield socket_url(sock)
    finally:
        is_over.set()
        thread.join(GUARD_S)


@contextlib.contextmanager
def the_control(redis_url: str, folder: Path) -> Iterator[str]:
    keys = Keys("test-http-limits-control")
    with redis.Redis.from_url(redis_url) as client:
        seed_run(client, keys)
    with a_control(redis_url, keys) as control:
        yield control.url


SERVICES: dict[str, Callable[[str, Path], contextlib.AbstractContextManager[str]]] = {
    "learner": a_learner,
    "replica": a_replica,
    "control": the_control,
}


@pytest.fixture(scope="module", params=SERVICES)
def url(request: pytest.FixtureRequest, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with SERVICES[request.param](redis_url, tmp_path_factory.mktemp("service")) as served:
        yield served


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=GUARD_S) as client:
        yield client


def is_problem(answer: httpx.Response, status: int) -> bool:
    return answer.status_code == status and answer.headers["content-type"] == "application/problem+json"


def test_large_requests_are_refused_by_length_and_as_they_come(http: httpx.Client) -> None:
    body = b" " * (http_limits.MAX_BODY_BYTES + 1)
    assert is_problem(http.request("POST", "/pause", content=body), 413)
    assert is_problem(http.request("POST", "/pause", content=iter([body[:-10], body[:20]])), 413)
    assert is_problem(http.request("GET", "/status", content=body), 413)


def test_a_slow_body_is_waited_for_with_a_deadline(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "BODY_TIMEOUT_S", 0.2)
    with connected(url) as connection:
        connection.sendall(b"POST /pause HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = everything(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"application/problem+json" in answer


@pytest.mark.parametrize("start", [b"", b"GET /status HTTP/1.1\r\nHost: localhost\r\n", b"GET /sta"])
def test_a_slow_head_is_waited_for_with_a_deadline(url: str, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.2)
    with connected(url) as connection:
        connection.sendall(start)
        assert everything(connection) == b""


def test_a_second_head_on_the_same_connection_has_a_deadline_too(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.3)
    with connected(url) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while not found.endswith(b'{"status":"ok"}'):
            found += connection.recv(65536)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
        assert everything(connection) == b""


@pytest.mark.parametrize("head", [b"\x00\xff\r\n\r\n", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n"])
def test_what_is_no_request_is_answered_so(url: str, http: httpx.Client, head: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(head)
        assert everything(connection).startswith(b"HTTP/1.1 400 ")
    assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "10.0.0.1"])
def test_another_name_for_loopback_is_refused(http: httpx.Client, host: str) -> None:
    assert is_problem(http.get("/status", headers={"host": host}), 421)
    assert is_problem(http.post("/pause", headers={"host": host}), 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "127.1.2.3"])
def test_loopbacks_own_names_are_taken(http: httpx.Client, host: str) -> None:
    assert http.get("/status", headers={"host": host}).status_code == 200


def test_elsewhere_any_name_is_taken(tmp_path: Path) -> None:
    sock = listen("0.0.0.0", 0)
    with serve_in_thread(learner_app(tmp_path, dict, Switches(), TOKEN), sock):
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/status"
        assert httpx.get(url, headers={"host": "learner.example"}, trust_env=False, timeout=GUARD_S).status_code == 200


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}"])
def test_what_changes_something_needs_the_token(http: httpx.Client, given: str | None) -> None:
    headers: dict[str, Any] = {} if given is None else {"authorization": given.encode()}
    assert is_problem(http.post("/pause", headers=headers), 401)


def connected(url: str) -> socket.socket:
    where = httpx.URL(url)
    return socket.create_connection((where.host, where.port), GUARD_S)


def everything(connection: socket.socket) -> bytes:
    """Until the other side has ended; reset counts as ended."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found
