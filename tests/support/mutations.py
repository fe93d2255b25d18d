"""Payloads gone wrong: hypothesis strategies for valid and mutated tickets, groups and heartbeats.

A mutated payload may by chance still be valid: whoever takes it in must refuse it or be able to use it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from msgspec.structs import replace

from headrace.common.wire import Group, Heartbeat, Rollout, Sampling, Segment, Ticket, VersionSpan, encode
from headrace.learner.intake.validation import GroupLimits
from tests.support.factories import make_group, make_rollout, make_ticket
from tests.support.poisons import SURROGATE, Poison, poisons
from tests.support.segmented import as_episodes, part_of, reply_starts

LIMITS = GroupLimits(vocab_size=512, group_size=2, num_eval_samples=3, max_sequence_tokens=64, highest_version=9)
"""What valid groups are within."""

LEAVES: list[Any] = [None, True, False, 0, 1, 2, -1, 255, 511, 512, 2**31 - 1, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63)]
LEAVES += [0.0, 0.5, -1.0, 1e-300, 1e39, 1e308, -1e308, float("nan"), float("inf"), float("-inf")]
LEAVES += ["", " ", "a b", "\x00", "\n", "é", "x" * 300, "train", "http://[", "http://h:99999", b"", b"\xff" * 5]
LEAVES += [[], {}, [[]], {"": ""}, [0] * 100, SURROGATE, msgspec.Raw(b"\xdd\xff\xff\xff\xff")]
LEAVES += [msgspec.Raw(b"\x91" * 500 + b"\xc0"), msgspec.Raw(b"\xc1"), msgspec.Raw(b"\xd4\x05\x01")]
"""What one value is replaced by. The raw ones: a lone surrogate, a list that claims 2**32 elements, a nest, a byte
that msgpack never uses, a value of an unknown type."""


def tokens(least: int, most: int) -> SearchStrategy[list[int]]:
    return st.binary(min_size=least, max_size=most).map(list)


@st.composite
def tickets(draw: DrawFn) -> Ticket:
    kind = draw(st.sampled_from(["train", "eval"]))
    return make_ticket(
        draw(st.sampled_from(["0-0", "12-34567", "3-4.1", "eval-2-7"])),
        kind=kind,
        prompt_tokens=draw(tokens(1, 8)),
        messages=draw(st.lists(st.just({"role": "user", "content": "1 + 1?"}), max_size=2)),
        reference=draw(
            st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.integers(-9, 9), max_size=2)
        ),
        num_completions=LIMITS.group_size if kind == "train" else LIMITS.num_eval_samples,
        sampling=Sampling(
            draw(st.sampled_from([0.1, 0.7, 1.0])), 16, draw(tokens(0, 2)), draw(st.sampled_from([[], ["\n\n"]]))
        ),
        issued_step=draw(st.integers(0, 9)),
        avoid=draw(st.sampled_from([[], ["a", "b"]])),
    )


@st.composite
def rollouts(draw: DrawFn) -> Rollout:
    """Of one or several turns, sampled by one or several versions."""
    mask = [token % 2 for token in draw(tokens(1, 15))] + [1]
    trained = sum(mask)
    edges = sorted({0, trained, draw(st.integers(0, trained)), draw(st.integers(0, trained))})
    versions = st.integers(1, LIMITS.highest_version)
    return make_rollout(
        draw(st.sampled_from([0.0, 1.0, -0.25, 1e9])),
        tuple(draw(tokens(len(mask), len(mask)))),
        loss_mask=bytes(mask),
        behaviour_logprobs=np.array(draw(tokens(trained, trained)), np.float32) / -12,
        version_spans=[VersionSpan(draw(versions), start, end) for start, end in pairwise(edges)],
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        text=draw(st.sampled_from(["", "2", "\n\x00é"])),
    )


def groups() -> SearchStrategy[Group]:
    return completions() | episodes()


@st.composite
def completions(draw: DrawFn) -> Group:
    ticket = draw(tickets())
    count = ticket.num_completions
    several = draw(st.lists(rollouts(), min_size=count, max_size=count))
    return replace(make_group(), ticket=ticket, rollouts=several)


@st.composite
def episodes(draw: DrawFn) -> Group:
    """Of one or several segments, some of them behind prompts of the group."""
    group = draw(completions())
    begun = [replace(one, segments=[_from_a_reply_on(one.segments[0])]) for one in group.rollouts]
    cuts = [[place for place in reply_starts(one) if draw(st.booleans())] for one in begun]
    group = as_episodes(replace(group, rollouts=begun), cuts)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    reasons = st.sampled_from(["stop", "max_turns", "max_tokens", "max_segments", "context"])
    return replace(
        group,
        ticket=replace(group.ticket, tools=draw(st.sampled_from([[], [tool]]))),
        rollouts=[
            replace(
                one,
                finish_reason=draw(reasons),
                metrics=draw(st.dictionaries(st.sampled_from(["guesses", "a/b"]), st.floats(-9, 9), max_size=2)),
                failed_episodes=draw(st.integers(0, 2)),
            )
            for one in group.rollouts
        ],
    )


def _from_a_reply_on(segment: Segment) -> Segment:
    return part_of(segment, segment.loss_mask.index(1), len(segment.tokens), 0)


@st.composite
def heartbeats(draw: DrawFn) -> Heartbeat:
    serving_s = draw(st.floats(0, 1e6))
    return Heartbeat(
        replica=draw(st.sampled_from(["a", "host-1234"])),
        url=draw(st.sampled_from(["http://127.0.0.1:8000", "https://host_1.example/x", "http://[::1]:80"])),
        state=draw(st.sampled_from(["starting", "running", "paused", "draining", "quarantined"])),
        reason=draw(st.sampled_from(["", "weights: no\nroute"])),
        weight_version=draw(st.integers(0, LIMITS.highest_version)),
        groups_in_flight=draw(st.integers(0, 9)),
        groups_committed=draw(st.integers(0, 9)),
        tokens_generated=draw(st.integers(0, 999)),
        waiting_s=draw(st.floats(0, serving_s)),
        serving_s=serving_s,
    )


def poison_groups() -> SearchStrategy[Poison]:
    return completions().flatmap(lambda group: st.sampled_from(poisons(group)))


def mutated_tickets() -> SearchStrategy[bytes]:
    return mutated(tickets().map(encode))


def mutated_groups() -> SearchStrategy[bytes]:
    return mutated(groups().map(encode))


def mutated_heartbeats() -> SearchStrategy[bytes]:
    return mutated(heartbeats().map(encode))


@st.composite
def mutated(draw: DrawFn, payloads: SearchStrategy[bytes]) -> bytes:
    """One mutation of a payload: mostly of its structure, else of its bytes; now and then bytes of no payload."""
    payload = draw(payloads)
    kind = draw(st.integers(0, 9))
    if kind == 9:
        return draw(st.binary())
    return draw(mutated_structure(payload) if kind < 6 else mutated_bytes(payload))


def mutated_bytes(payload: bytes) -> SearchStrategy[bytes]:
    """A bit flipped, the end missing, bytes appended, a stretch written over another, or bytes inserted."""
    places = st.integers(0, len(payload) - 1)

    def flip(place: int, bit: int) -> bytes:
        return payload[:place] + bytes([payload[place] ^ (1 << bit)]) + payload[place + 1 :]

    def splice(source: int, target: int, length: int) -> bytes:
        return payload[:target] + payload[source : source + length] + payload[target + length :]

    return (
        st.builds(flip, places, st.integers(0, 7))
        | places.map(lambda place: payload[:place])
        | st.binary(min_size=1, max_size=9).map(lambda more: payload + more)
        | st.builds(splice, places, places, st.integers(1, 40))
        | st.builds(lambda at, more: payload[:at] + more + payload[at:], places, st.binary(min_size=1, max_size=9))
    )


@st.composite
def mutated_structure(draw: DrawFn, payload: bytes) -> bytes:
    """One place of the structure nudged, replaced, retyped, dropped, doubled, or exchanged for another's value."""
    tree = msgspec.msgpack.decode(payload)
    places = list(walk(tree))
    numbers = [(container, key) for container, key in places if type(container[key]) in (int, float)]
    kind = draw(st.sampled_from(["nudge", "nudge", "replace", "retype", "drop", "add", "exchange"]))
    container, key = draw(st.sampled_from(numbers if kind == "nudge" else places))
    value = container[key]
    match kind:
        case "nudge":
            container[key] = value + draw(st.sampled_from([400, 1, -1, 0.5]))
        case "replace":
            container[key] = draw(st.sampled_from(LEAVES))
        case "retype":
            container[key] = draw(st.sampled_from([[value], {"x": value}, str(value), str(value).encode(), None]))
        case "drop":
            del container[key]
        case "add" if isinstance(container, list):
            container.insert(key, draw(st.just(value) | st.sampled_from(LEAVES)))
        case "add":
            container["unknown"] = draw(st.sampled_from(LEAVES))
        case "exchange":
            other, place = draw(st.sampled_from(places))
            container[key] = msgspec.Raw(msgspec.msgpack.encode(other[place]))
    return msgspec.msgpack.encode(tree)


def walk(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of nested lists and dicts, as container and key."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from walk(value)
