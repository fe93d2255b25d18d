"""What a service logs: a line that people and programs read, with the ids by which a ticket is followed."""

import asyncio
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.common.process.logs import (
    LineFormatter,
    add_process_fields,
    format_line,
    line_as_dict,
    log_context,
    parse_line,
)
from headrace.common.process.run_token import load_or_create_token
from headrace.common.redis.client import connect
from tests.support.fake_services import Faking, ended, faking
from tests.support.guard import GUARD_S

__all__ = ["faking"]
ROOT = Path(__file__).parents[2]
Logged = Callable[[], list[str]]


@pytest.fixture
def log() -> logging.Logger:
    return logging.getLogger("headrace.tested")


@pytest.fixture
def logged() -> Iterator[Logged]:
    """What a learner of the run `demo` writes; the lines since the last look."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("learner", run="demo"))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)

    def lines() -> list[str]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return text.splitlines()

    yield lines
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_line_is_read_as_it_was_written(log: logging.Logger, logged: Logged) -> None:
    add_process_fields(step=lambda: 12)
    log.info("trained: %d of 2", 1, extra={"tickets": ["0-1", "eval-3-4", "0-2.1"]})
    (text,) = logged()
    assert text.split(" ", 1)[1] == "INFO learner run=demo step=12 tickets=0-1,eval-3-4,0-2.1: trained: 1 of 2"
    line = parse_line(text)
    assert line is not None and format_line(line) == text
    assert line_as_dict(line) == {
        "time": text.split()[0],
        "level": "INFO",
        "service": "learner",
        "run": "demo",
        "step": 12,
        "tickets": ["0-1", "eval-3-4", "0-2.1"],
        "message": "trained: 1 of 2",
    }


def test_the_nearest_says_a_field(log: logging.Logger, logged: Logged) -> None:
    add_process_fields(step=1)
    with log_context(step=2, ticket="0-1"):
        log.info("work")
        log.info("call", extra={"step": 3})
    log.info("process")
    fields = [line.fields for line in map(parse_line, logged()) if line]
    assert fields == [
        {"run": "demo", "step": "2", "ticket": "0-1"},
        {"run": "demo", "step": "3", "ticket": "0-1"},
        {"run": "demo", "step": "1"},
    ]


def test_tasks_and_threads_do_not_mix_their_tickets(log: logging.Logger, logged: Logged) -> None:
    async def answer(ticket: str, mine: asyncio.Event, other: asyncio.Event) -> None:
        with log_context(ticket=ticket):
            mine.set()
            await other.wait()
            log.info("task")

    async def both() -> None:
        one, other = asyncio.Event(), asyncio.Event()
        await asyncio.gather(answer("0-1", one, other), answer("0-2", other, one))

    asyncio.run(both())
    with log_context(ticket="0-3"):
        thread = threading.Thread(target=log.info, args=("thread",))
        thread.start()
        thread.join()
    found = [(line.message, line.fields.get("ticket")) for line in map(parse_line, logged()) if line]
    assert sorted(found, key=str) == [("task", "0-1"), ("task", "0-2"), ("thread", None)]


def test_no_text_forges_a_line(log: logging.Logger, logged: Logged) -> None:
    """A completion in an error, a ticket of hostile name, a terminal's escapes."""
    forged = "2026-01-01T00:00:00.000Z INFO learner run=demo: all is well"
    log.warning("bad\n%s\r\x1b[2J\x85%s", forged, forged, extra={"ticket": f"0-1: x\n{forged}"})
    first, *rest = logged()
    line = parse_line(first)
    assert line is not None and line.level == "WARNING" and not any(map(parse_line, rest))
    assert all(line.startswith("  ") for line in rest) and not any("\x1b" in line or "\r" in line for line in rest)


def test_a_traceback_is_kept_with_its_line(log: logging.Logger, logged: Logged) -> None:
    try:
        raise ValueError("no such thing")
    except ValueError:
        log.exception("failed")
    first, *rest = logged()
    assert parse_line(first) and rest[0] == "  Traceback (most recent call last):"
    assert rest[-1] == "  ValueError: no such thing" and len(rest) > 2


def test_a_library_is_named_and_a_long_text_bounded(logged: Logged) -> None:
    logging.getLogger("uvicorn.error").warning("x" * 100_000)
    (first, *_) = lines = logged()
    assert ": uvicorn.error: xxx" in first and sum(map(len, lines)) < 9000


def test_no_line_has_a_secret(log: logging.Logger, logged: Logged, tmp_path: Path) -> None:
    token = load_or_create_token(tmp_path / "token")
    connect("redis://user:pass%2Fword@127.0.0.1:1/0").close()
    try:
        raise ValueError(f"token {token}")
    except ValueError:
        log.exception("password pass/word, redis://:other@10.0.0.1:6379, Bearer %s", token)
    text = "\n".join(logged())
    assert "token ..." in text and "Bearer ..." in text and "password ..., redis://:...@10.0.0.1:6379" in text
    assert token not in text and "pass/word" not in text and "other" not in text


def test_a_line_costs_little() -> None:
    """Bytes of a ticket's way: docs say about 400."""
    formatter = LineFormatter("generation", run="demo", replica="generation-0")
    record = logging.LogRecord("headrace.x", logging.INFO, "", 0, "leased, for version %d or later", (12,), None)
    record.ticket = "0-12345"
    assert len(formatter.format(record)) < 140


def test_services_that_are_refused_name_no_password(tmp_path: Path) -> None:
    for module in ("headrace.generation", "headrace.learner"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--run", "x", "--redis-url", "redis://:secret-word@127.0.0.1:1:2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
        )
        assert done.returncode == 2 and "secret-word" not in done.stderr + done.stdout


def test_the_launchers_log_has_what_it_says_and_not_the_token(faking: Faking) -> None:
    """Which it shows once, on the screen, in the page's address."""
    fakes = faking(learner="sys.exit(0)")
    output = ended(fakes.up(), 0)
    token, log = (fakes.run / "token").read_text(), (fakes.run / "logs" / "launcher.log").read_text()
    assert f"#token={token}" in output and token not in log and "#token=..." in log
    lines = [parse_line(line) for line in log.splitlines()]
    assert all(line and (line.service, line.fields) == ("launcher", {"run": "faked"}) for line in lines)
    assert lines[0] and lines[0].message.startswith(f"run faked in {fakes.run}")


def test_up_says_objects_for_programs(faking: Faking) -> None:
    fakes = faking(learner="sys.exit(0)")
    said = [json.loads(line) for line in ended(fakes.up("--json"), 0).splitlines()]
    assert said[0]["text"].startswith("run faked in ") and said[-1]["summary"] is None
