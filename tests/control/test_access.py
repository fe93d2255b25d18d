"""Access to control: every route without a token, with a wrong one, and with hostile input."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from headrace.common.config import load_recipe
from headrace.common.http import limits as http_limits
from headrace.common.http.addresses import bearer_header
from headrace.common.redis.keys import Keys
from tests.support.control_service import TOKEN, Control, a_control
from tests.support.seeded_run import RECIPE, seed_run

CHANGING: list[tuple[str, str, Any]] = [
    ("POST", "/pause", None),
    ("POST", "/resume", None),
    ("POST", "/checkpoint", None),
    ("POST", "/evaluations", None),
    ("POST", "/stop", None),
    ("POST", "/replicas/generation-0/drain", None),
    ("PUT", "/replicas/desired", {"replicas": 3}),
    ("PATCH", "/settings", {"settings": {"optimizer.lr": 1e-5}}),
]
READING = ["/status", "/replicas", "/replicas/generation-0", "/groups", "/groups/0-1", "/evaluations", "/history"]
READING += ["/events/recent", "/settings"]
WRONG = [None, "Bearer", "Bearer wrong", f"bearer {TOKEN}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer é"]


@pytest.fixture(scope="module")
def keys() -> Keys:
    return Keys("test-control-access")


@pytest.fixture(scope="module")
def control(redis_url: str, keys: Keys) -> Iterator[Control]:
    with redis.Redis.from_url(redis_url) as client:
        seed_run(client, keys)
    with a_control(redis_url, keys) as served:
        yield served


@pytest.fixture(scope="module")
def guarded(redis_url: str, keys: Keys, control: Control) -> Iterator[Control]:
    """The same run, by a control that protects reads too."""
    with a_control(redis_url, keys, require_token_for_reads=True) as served:
        yield served


def is_problem(answer: Any, status: int) -> bool:
    body = answer.json()
    return bool(
        answer.status_code == status == body["status"]
        and answer.headers["content-type"] == "application/problem+json"
        and body.keys() == {"type", "title", "status", "detail"}
        and TOKEN not in answer.text
    )


@pytest.mark.parametrize(("method", "path", "body"), CHANGING)
@pytest.mark.parametrize("given", WRONG)
def test_what_changes_something_needs_the_token(
    control: Control, client: redis.Redis, keys: Keys, method: str, path: str, body: Any, given: str | None
) -> None:
    before = client.hgetall(keys.control), client.xlen(keys.events)
    headers = {} if given is None else {"authorization": given.encode()}
    answer = control.http.request(method, path, json=body, headers=headers)  # type: ignore[arg-type]
    assert is_problem(answer, 401), answer.text
    assert (client.hgetall(keys.control), client.xlen(keys.events)) == before


@pytest.mark.parametrize("path", READING)
def test_reading_is_open_unless_it_is_protected(control: Control, guarded: Control, path: str) -> None:
    assert control.http.get(path).status_code == 200
    assert is_problem(guarded.http.get(path), 401)
    assert is_problem(guarded.http.get(path, headers={"authorization": "Bearer wrong"}), 401)
    assert guarded.ask("GET", path).status_code == 200


def test_protected_streams_and_what_is_always_open(guarded: Control) -> None:
    assert is_problem(guarded.http.get("/events"), 401)
    for path in ("/healthz", "/", "/openapi.json"):
        assert guarded.http.get(path).status_code == 200


def test_the_page_can_check_its_token(control: Control) -> None:
    assert control.ask("GET", "/auth").status_code == 204
    assert is_problem(control.http.get("/auth"), 401)
    assert is_problem(control.http.get("/auth", params={"token": TOKEN}), 401)


NAMES = ["%2e%2e%2f%2e%2e", "%00", "x" * 201, "x" * 5000, "a%0d%0ab", "%ff%fe", "'; drop", "*", "{x}"]
NAMES += ["%F0%9F%92%A9", "a%2fb"]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_names_are_not_found(control: Control, name: str) -> None:
    for method, path in (("GET", "/replicas/{}"), ("GET", "/groups/{}"), ("POST", "/replicas/{}/drain")):
        answer = control.ask(method, path.format(name))
        assert answer.status_code in (404, 405, 422) and is_problem(answer, answer.status_code), answer.text


@pytest.mark.parametrize(
    "path",
    [
        *("/history?max_points=0", "/history?max_points=9e9", "/history?after=1", "/history?after=-1-1"),
        *("/history?after=" + "9" * 400 + "-1", "/groups?limit=-1", "/groups?kind=x", "/groups?step=-1"),
        *("/groups?step=" + "9" * 400, "/groups?state=%00", "/groups?replica=", "/events/recent?limit=701"),
    ],
)
def test_invalid_queries_are_rejected(control: Control, path: str) -> None:
    assert is_problem(control.http.get(path), 422)


BODIES = [b"", b"{", b"\xff", b"[" * 30_000, b"null", b"[]", b'"x"', b"1", b'{"replicas": 1, "more": 1}', b"{}"]
BODIES += [b'{"replicas": NaN}', b'{"replicas": 1e999}', b'{"settings": {"optimizer.lr": NaN}}', b'{"replicas": "1"}']
BODIES += [b'{"settings": {"a": 1}, "version": 1e99}', b'{"settings": ' + b'{"a":' * 2000 + b"1" + b"}" * 2001]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body[:30].decode(errors="replace"))
@pytest.mark.parametrize(("method", "path"), [("PUT", "/replicas/desired"), ("PATCH", "/settings")])
def test_invalid_bodies_are_rejected(control: Control, method: str, path: str, body: bytes) -> None:
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        answer = control.ask(method, path, content=body, headers={"content-type": kind})
        assert answer.status_code in (400, 422) and is_problem(answer, answer.status_code), answer.text


def test_an_error_does_not_repeat_what_was_sent(control: Control) -> None:
    bodies: list[Any] = [{"settings": {"optimizer.lr": "hush"}}, {"settings": {"a": 1}, "version": "hush"}]
    for body in [*bodies, {"settings": "hush"}, "hush"]:
        assert "hush" not in control.ask("PATCH", "/settings", json=body).text


def test_large_requests_are_rejected_by_length_and_while_they_arrive(control: Control) -> None:
    body = b" " * (http_limits.MAX_BODY_BYTES + 1)
    assert is_problem(control.ask("PATCH", "/settings", content=body), 413)
    assert is_problem(control.ask("PATCH", "/settings", content=iter([body[:-10], body[:20]])), 413)
    assert is_problem(control.http.request("GET", "/status", content=body), 413)


def test_other_origins_get_no_access(control: Control) -> None:
    for method, path in (("OPTIONS", "/pause"), ("GET", "/status"), ("POST", "/pause")):
        headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        answer = control.http.request(method, path, headers=headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "path",
    [
        *("/page/..%2fapi.py", "/page/%2e%2e/api.py", "/page/....//api.py", "/page//etc/passwd", "/page"),
        *("/page/%2fetc%2fpasswd", "/page/..%2f..%2f..%2fREADME.md", "/page/..%2fpage/..%2fapi.py", "/page/"),
        *("/page/none.js", "/page/%00.js", "/page/" + "x" * 3000 + ".js", "/page/..\\api.py"),
    ],
)
def test_the_page_serves_only_its_folder(control: Control, path: str) -> None:
    assert is_problem(control.http.get(path), 404)


def test_the_page_may_contact_no_other_origin(control: Control) -> None:
    answer = control.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html") and "default-src 'none'" in policy
    assert "unsafe" not in policy and not re.search(r"https?:|\*", policy)
    assert control.http.get("/page/index.html").status_code == 200


def test_unknown_paths_and_methods_are_problems(control: Control) -> None:
    assert is_problem(control.http.get("/nowhere"), 404)
    answer = control.http.delete("/status")
    assert is_problem(answer, 405) and answer.headers["allow"] == "GET"


def test_the_token_is_in_no_log(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for method, path, body in CHANGING:
            control.ask(method, path, json=body)
        control.http.get("/status", headers=bearer_header(TOKEN))
        control.ask("POST", "/resume")
    assert TOKEN not in "".join(record.getMessage() for record in caplog.records if record.name != "asyncio")
    assert TOKEN not in control.http.get("/settings").text + control.http.get("/events/recent").text


def test_control_listens_on_loopback_unless_told_otherwise() -> None:
    settings = load_recipe(RECIPE, []).config.control
    assert (settings.host, settings.port, settings.require_token_for_reads) == ("127.0.0.1", 0, False)
