"""The wire format: typed msgspec structs in msgpack, never pickle; every payload is validated here.

For any bytes, `decode_*` either returns a value that is safe to use or raises `WireError`. It raises no other exception
and takes no more memory or time than the largest valid payload. The structs are in `headrace.common.wire.structs`, and
the conditions that they must satisfy in `headrace.common.wire.checks`; other modules import both from here.
"""

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from headrace.common.wire.checks import (
    MIN_TEMPERATURE,
    WireError,
    check_group,
    check_heartbeat,
    check_ticket,
    name_problem,
    one_line,
)
from headrace.common.wire.rollout_checks import metrics_problem
from headrace.common.wire.structs import (
    GROUP_SCHEMA,
    MAX_COMPLETIONS,
    MAX_SEGMENTS,
    MAX_SEQUENCE_TOKENS,
    MAX_TOKEN,
    READABLE_GROUP_SCHEMAS,
    READABLE_SCHEMAS,
    SCHEMA,
    DecidedState,
    FinishReason,
    Group,
    Heartbeat,
    Limits,
    Message,
    ReplicaState,
    Role,
    Rollout,
    Sampling,
    Segment,
    SegmentOrigin,
    Ticket,
    TicketKind,
    TicketState,
    Timings,
    Turn,
    VersionSpan,
)

__all__ = [
    "GROUP_SCHEMA",
    "MAX_TOKEN",
    "MIN_TEMPERATURE",
    "SCHEMA",
    "DecidedState",
    "FinishReason",
    "Group",
    "Heartbeat",
    "Limits",
    "Message",
    "ReplicaState",
    "Role",
    "Rollout",
    "Sampling",
    "Segment",
    "SegmentOrigin",
    "Ticket",
    "TicketKind",
    "TicketState",
    "Timings",
    "Turn",
    "VersionSpan",
    "WireError",
    "check_group",
    "check_ticket",
    "decode_group",
    "decode_heartbeat",
    "decode_ticket",
    "encode",
    "metrics_problem",
    "name_problem",
    "one_line",
]

MAX_TICKET_BYTES = 16 << 20
MAX_GROUP_BYTES = 64 << 20
"""About 6 million tokens: 64 completions of 100,000."""
MAX_HEARTBEAT_BYTES = 64 << 10
MAX_JSON_BYTES = {"reference": 1 << 20, "messages": 8 << 20, "tools": 256 << 10}
"""Fields without a fixed type: small values take 64 times their encoded size in memory."""


class _RawTicket(Ticket, frozen=True, kw_only=True):
    """A ticket in a payload: fields without a fixed type are decoded only after their length has been checked."""

    reference: msgspec.Raw  # type: ignore[assignment]
    messages: msgspec.Raw  # type: ignore[assignment]
    tools: msgspec.Raw = msgspec.Raw(b"\x90")  # type: ignore[assignment]


_Int32Bytes = Annotated[bytes, msgspec.Meta(max_length=4 * MAX_SEQUENCE_TOKENS)]


class _RawSegment(Segment, frozen=True, kw_only=True):
    tokens: _Int32Bytes  # type: ignore[assignment]
    loss_mask: Annotated[bytes, msgspec.Meta(max_length=MAX_SEQUENCE_TOKENS)]
    behaviour_logprobs: bytes  # type: ignore[assignment]


class _RawRollout(Rollout, frozen=True, kw_only=True):
    segments: Annotated[list[_RawSegment], msgspec.Meta(max_length=MAX_SEGMENTS)] = []  # type: ignore[assignment]


class _RawGroup(Group, frozen=True, kw_only=True):
    ticket: _RawTicket
    rollouts: Annotated[list[_RawRollout], msgspec.Meta(max_length=MAX_COMPLETIONS)]  # type: ignore[assignment]
    prompts: Annotated[list[_Int32Bytes], msgspec.Meta(max_length=MAX_COMPLETIONS)] = []  # type: ignore[assignment]


class _Schema2Rollout(_RawSegment, frozen=True, kw_only=True):
    """A rollout of schema 2 was one segment."""

    reward: float
    finish_reason: FinishReason
    text: str = ""


class _Schema2Group(_RawGroup, frozen=True, kw_only=True):
    rollouts: Annotated[list[_Schema2Rollout], msgspec.Meta(max_length=MAX_COMPLETIONS)]  # type: ignore[assignment]


class _Schema(msgspec.Struct):
    schema: int | None = None


SCHEMA_WITHOUT_SEGMENTS = 2
Payload = TypeVar("Payload")
_UNDECODABLE = (ValueError, RecursionError, MemoryError)
"""The exceptions of msgspec; its own errors and UnicodeDecodeError are `ValueError`s."""


_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")


def _encode_array(value: object) -> bytes:
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(_FLOAT32, copy=False).tobytes()
    if isinstance(value, np.ndarray) and value.dtype == np.int32:
        return value.astype(_INT32, copy=False).tobytes()
    raise NotImplementedError(f"{type(value).__name__} {getattr(value, 'dtype', '')} has no wire form")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_ticket_decoder = msgspec.msgpack.Decoder(_RawTicket)
_group_decoder = msgspec.msgpack.Decoder(_RawGroup)
_schema_2_decoder = msgspec.msgpack.Decoder(_Schema2Group)
_heartbeat_decoder = msgspec.msgpack.Decoder(Heartbeat)
_json_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "reference": msgspec.msgpack.Decoder(dict[str, Any]),
    "messages": msgspec.msgpack.Decoder(Annotated[list[Message], msgspec.Meta(max_length=4096)]),
    "tools": msgspec.msgpack.Decoder(list[dict[str, Any]]),
}
_schema_decoder = msgspec.msgpack.Decoder(_Schema)


def encode(value: Ticket | Group | Heartbeat) -> bytes:
    return _encoder.encode(value)


def decode_ticket(payload: bytes) -> Ticket:
    """Raises `WireError` if the payload is not a valid ticket of a readable schema."""
    ticket = _to_ticket(_decode(_ticket_decoder, payload, MAX_TICKET_BYTES, *READABLE_SCHEMAS))
    check_ticket(ticket)
    return ticket


def decode_heartbeat(payload: bytes) -> Heartbeat:
    """Raises `WireError` if the payload is not a valid heartbeat of a readable schema."""
    heartbeat = _decode(_heartbeat_decoder, payload, MAX_HEARTBEAT_BYTES, *READABLE_SCHEMAS)
    _expect_schema(heartbeat.schema, *READABLE_SCHEMAS)
    check_heartbeat(heartbeat)
    return heartbeat


def decode_group(payload: bytes) -> Group:
    """Raises `WireError` if the payload is not a valid group of a readable schema."""
    raw = _decode_raw_group(payload)
    ticket = _to_ticket(raw.ticket)
    segments = [segment for rollout in raw.rollouts for segment in rollout.segments]
    all_tokens, tokens = _arrays([one.tokens for one in segments], _INT32, "tokens")
    all_logprobs, logprobs = _arrays([one.behaviour_logprobs for one in segments], _FLOAT32, "behaviour_logprobs")
    decoded = iter(
        Segment(tokens[i], one.loss_mask, logprobs[i], one.version_spans, one.prompt, one.origin)
        for i, one in enumerate(segments)
    )
    rollouts = [
        Rollout(
            list(islice(decoded, len(one.segments))),
            one.reward,
            one.finish_reason,
            one.text,
            one.turns,
            one.metrics,
            one.failed_episodes,
        )
        for one in raw.rollouts
    ]
    _, prompts = _arrays(raw.prompts, _INT32, "a prompt")
    group = Group(ticket, rollouts, raw.replica, raw.timings, prompts)
    check_group(group, (all_tokens, all_logprobs))
    return group


def _decode_raw_group(payload: bytes) -> _RawGroup:
    if len(payload) <= MAX_GROUP_BYTES and _schema_of(payload) == SCHEMA_WITHOUT_SEGMENTS:
        old = _decode(_schema_2_decoder, payload, MAX_GROUP_BYTES, *READABLE_GROUP_SCHEMAS)
        rollouts = [
            _RawRollout(segments=[one], reward=one.reward, finish_reason=one.finish_reason, text=one.text)
            for one in old.rollouts
        ]
        return _RawGroup(ticket=old.ticket, rollouts=rollouts, replica=old.replica, timings=old.timings)
    raw = _decode(_group_decoder, payload, MAX_GROUP_BYTES, *READABLE_GROUP_SCHEMAS)
    _expect_schema(raw.schema, *READABLE_GROUP_SCHEMAS)
    for index, rollout in enumerate(raw.rollouts):
        if not rollout.segments:
            raise WireError(f"group {raw.ticket.id}, rollout {index}: no segments")
    return raw


def _to_ticket(raw: _RawTicket) -> Ticket:
    _expect_schema(raw.schema, *READABLE_SCHEMAS)
    fields = msgspec.structs.asdict(raw)
    for name, decoder in _json_decoders.items():
        num_bytes = memoryview(fields[name]).nbytes
        if num_bytes > MAX_JSON_BYTES[name]:
            raise WireError(f"a ticket's {name} of {num_bytes} bytes, more than {MAX_JSON_BYTES[name]}")
        try:
            fields[name] = decoder.decode(fields[name])
        except _UNDECODABLE as error:
            raise WireError(f"cannot decode a ticket's {name}: {error}") from error
    return Ticket(**{**fields, "schema": SCHEMA})


def _arrays(parts: Sequence[Any], dtype: np.dtype[Any], name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The parts concatenated in one array, and each part as a view of it."""
    ends = [0]
    for part in parts:
        if len(part) % 4:
            raise WireError(f"{len(part)} bytes of {name}, expected 4 for each")
        ends.append(ends[-1] + len(part) // 4)
    whole = np.frombuffer(b"".join(parts), dtype)
    return whole, [whole[start:end] for start, end in pairwise(ends)]


def _decode(decoder: msgspec.msgpack.Decoder[Payload], payload: bytes, max_bytes: int, *schemas: int) -> Payload:
    if len(payload) > max_bytes:
        raise WireError(f"{len(payload)} bytes, more than {max_bytes}")
    try:
        return decoder.decode(payload)
    except _UNDECODABLE as error:
        _expect_schema(_schema_of(payload), *schemas)
        raise WireError(f"cannot decode {len(payload)} bytes: {error}") from error


def _schema_of(payload: bytes) -> int | None:
    """The schema that an undecodable payload names; None if it names none."""
    try:
        return _schema_decoder.decode(payload).schema
    except _UNDECODABLE:
        return None


def _expect_schema(schema: int | None, *expected: int) -> None:
    if schema is not None and schema not in expected:
        raise WireError(f"schema {schema}, expected {' or '.join(map(str, expected))}")
