"""Whatever the bytes: a value that every later use survives, or a `WireError` of one short line, in bounded time."""

import json
import time
from collections.abc import Callable

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from headrace.common.wire import WireError, decode_group, decode_heartbeat, decode_ticket, encode, one_line
from headrace.common.wire.checks import is_url
from headrace.generation.engine.completions import generate_body
from tests.support.factories import make_group, make_ticket
from tests.support.mutations import mutated_heartbeats, mutated_tickets
from tests.support.poisons import altered

thorough = settings(max_examples=200)


@thorough
@given(mutated_tickets())
def test_mutated_tickets_are_refused_or_can_be_asked_of_an_engine(payload: bytes) -> None:
    try:
        ticket = decode_ticket(payload)
    except WireError as error:
        assert_short(error)
        return
    rids = [f"x-{index}." for index in range(ticket.num_completions)]
    json.dumps(generate_body(ticket, rids), allow_nan=False)
    json.dumps([ticket.reference, ticket.messages], allow_nan=False)
    again = replace(ticket, attempts=ticket.attempts, avoid=sorted({*ticket.avoid, "r"}))
    assert decode_ticket(encode(again)) == again


@thorough
@given(mutated_heartbeats())
def test_mutated_heartbeats_are_refused_or_usable(payload: bytes) -> None:
    try:
        heartbeat = decode_heartbeat(payload)
    except WireError as error:
        assert_short(error)
        return
    assert heartbeat.serving_s == 0 or heartbeat.waiting_s / heartbeat.serving_s < 1.01
    json.dumps(msgspec.to_builtins(heartbeat), allow_nan=False)
    decode_ticket(encode(make_ticket(min_weight_version=heartbeat.weight_version + 10**9)))
    notify(heartbeat.url)


@thorough
@given(st.from_regex(r"\Ahttps?://[a-z0-9.:\[\]/_-]{0,30}\Z") | st.text(max_size=20).map("http://{}".format))
def test_an_http_client_takes_every_url_that_passes(url: str) -> None:
    if is_url(url):
        notify(url)


def notify(url: str) -> None:
    """The hint that a version is out, as far as the socket."""
    taken = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(202)))
    taken.post(f"{url}/weights", json={"version": 1}).raise_for_status()
    httpx.URL(url).host.encode("idna")  # as `socket.getaddrinfo` does


def assert_short(error: WireError) -> None:
    assert str(error).isprintable() and 0 < len(str(error)) <= 300


def test_a_reason_is_one_short_line_whatever_it_quotes() -> None:
    assert one_line("a\nb\x00\ud800ü") == r"a\nb\x00\ud800ü"
    assert len(one_line("\n" * 10**6)) == len(one_line("x" * 301)) == 300
    assert one_line("x" * 300) == "x" * 300
    with pytest.raises(WireError, match="Invalid enum value 'xxx") as refusal:
        decode_ticket(encode(make_ticket(kind="x" * 10**6)))
    assert_short(refusal.value)


def in_group(raw: bytes, *path: str | int) -> bytes:
    """A valid group with the bytes where `path` leads."""
    return altered(encode(make_group()), path, msgspec.Raw(raw))


def text(num_bytes: int) -> bytes:
    return b"\xdb" + num_bytes.to_bytes(4) + b"x" * num_bytes


def binary(num_bytes: int) -> bytes:
    return b"\xc6" + num_bytes.to_bytes(4) + bytes(num_bytes)


def many(element: bytes, count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4) + element * count


def nest(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


CLAIM = b"\xdd\xff\xff\xff\xff"
"""A list that claims 2**32 - 1 elements."""
REFERENCE, SPANS = ("ticket", "reference", "x"), ("rollouts", 0, "segments", 0, "version_spans")
BOMBS: dict[str, Callable[[], bytes]] = {
    "100 MB of junk": lambda: np.random.default_rng(0).bytes(10**8),
    "100 MB of nothing": lambda: bytes(10**8),
    "100 MB of text": lambda: in_group(text(10**8), "rollouts", 0, "text"),
    "100 MB of an unknown field": lambda: in_group(text(10**8), "unknown"),
    "an id of 60 MB": lambda: in_group(text(6 * 10**7), "ticket", "id"),
    "a kind of 60 MB": lambda: in_group(text(6 * 10**7), "ticket", "kind"),
    "2**32 of something": lambda: CLAIM,
    "2**32 rollouts": lambda: in_group(CLAIM, "rollouts"),
    "2**32 tokens": lambda: in_group(CLAIM, "rollouts", 0, "segments", 0, "tokens"),
    "2**32 in the reference": lambda: in_group(CLAIM, *REFERENCE),
    "2**32 in an unknown field": lambda: in_group(CLAIM, "unknown"),
    "2**32 bytes of logprobs": lambda: in_group(
        b"\xc6\xff\xff\xff\xff", "rollouts", 0, "segments", 0, "behaviour_logprobs"
    ),
    "10,000 deep": lambda: nest(10_000),
    "10,000 deep in maps": lambda: b"\x81\xa1x" * 10_000,
    "10,000 deep in the reference": lambda: in_group(nest(10_000), *REFERENCE),
    "900 deep in the reference": lambda: in_group(nest(900), *REFERENCE),
    "32 deep in the reference": lambda: in_group(nest(32), *REFERENCE),
    "10,000 deep in an unknown field": lambda: in_group(nest(10_000), "unknown"),
    "10,000 deep in the logprobs": lambda: in_group(nest(10_000), "rollouts", 0, "segments", 0, "behaviour_logprobs"),
    "60 MB of empty lists in the reference": lambda: in_group(many(b"\x90", 6 * 10**7), *REFERENCE),
    "1 MB of empty lists in the reference": lambda: in_group(many(b"\x90", 1_040_000), *REFERENCE),
    "60 MB of empty messages": lambda: in_group(many(b"\x80", 6 * 10**7), "ticket", "messages"),
    "60 MB of empty spans": lambda: in_group(many(b"\x93\x01\x00\x00", 15 * 10**6), *SPANS),
    "a million empty spans": lambda: in_group(many(b"\x93\x01\x00\x00", 10**6), *SPANS),
    "60 MB of a list of tokens": lambda: in_group(many(b"\x01", 6 * 10**7), "rollouts", 0, "segments", 0, "tokens"),
    "60 MB of tokens": lambda: in_group(binary(6 * 10**7), "rollouts", 0, "segments", 0, "tokens"),
    "60 MB of a mask": lambda: in_group(binary(6 * 10**7), "rollouts", 0, "segments", 0, "loss_mask"),
    "2**32 bytes of tokens": lambda: in_group(b"\xc6\xff\xff\xff\xff", "rollouts", 0, "segments", 0, "tokens"),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused_in_bounded_time(bomb: Callable[[], bytes]) -> None:
    payload = bomb()
    started = time.process_time()
    with pytest.raises(WireError) as refusal:
        decode_group(payload)
    assert time.process_time() - started < 10  # of a CPU that may be slow; what is not bounded takes minutes
    assert_short(refusal.value)


def test_a_field_that_stands_twice_counts_once_and_the_first_is_not_even_decoded() -> None:
    """The last one counts; a bomb before it costs no memory."""
    ticket = encode(make_ticket())
    head = b"\xde" + (int.from_bytes(ticket[1:3]) + 1).to_bytes(2)  # a map of one field more
    twice = head + b"\xa9reference" + b"\x81\xa1x" + many(b"\x90", 10**7) + ticket[3:]
    started = time.process_time()
    assert decode_ticket(twice) == make_ticket()
    assert time.process_time() - started < 0.5
