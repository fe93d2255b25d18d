"""The wire format: typed msgspec structs in msgpack, never pickle; every payload is validated here.

For any bytes, `decode_*` either returns a value that is safe to use or raises `WireError`. It raises no other exception
and takes no more memory or time than the largest valid payload. The structs are in `headrace.common.wire.structs`, and
the conditions that they must satisfy in `headrace.common.wire.checks`; other modules import both from here.
"""

from collections.abc import Sequence
from itertools import pairwise
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
from headrace.common.wire.structs import (
    GROUP_SCHEMA,
    MAX_COMPLETIONS,
    MAX_SEQUENCE_TOKENS,
    MAX_TOKEN,
    READABLE_SCHEMAS,
    SCHEMA,
    DecidedState,
    FinishReason,
    Group,
    Heartbeat,
    Message,
    ReplicaState,
    Rollout,
    Sampling,
    Ticket,
    TicketKind,
    TicketState,
    Timings,
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
    "Message",
    "ReplicaState",
    "Rollout",
    "Sampling",
    "Ticket",
    "TicketKind",
    "TicketState",
    "Timings",
    "VersionSpan",
    "WireError",
    "check_group",
    "check_ticket",
    "decode_group",
    "decode_heartbeat",
    "decode_ticket",
    "encode",
    "name_problem",
    "one_line",
]

MAX_TICKET_BYTES = 16 << 20
MAX_GROUP_BYTES = 64 << 20
"""About 6 million tokens: 64 completions of 100,000."""
MAX_HEARTBEAT_BYTES = 64 << 10
MAX_REFERENCE_BYTES = 1 << 20
"""A reference has no fixed type, and small values take 64 times their encoded size in memory."""


class _RawTicket(Ticket, frozen=True, kw_only=True):
    """A ticket in a payload: the reference is decoded only after its length has been checked."""

    reference: msgspec.Raw  # type: ignore[assignment]


class _RawRollout(Rollout, frozen=True, kw_only=True):
    tokens: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_SEQUENCE_TOKENS)]  # type: ignore[assignment]
    loss_mask: Annotated[bytes, msgspec.Meta(max_length=MAX_SEQUENCE_TOKENS)]
    behaviour_logprobs: bytes  # type: ignore[assignment]


class _RawGroup(Group, frozen=True, kw_only=True):
    ticket: _RawTicket
    rollouts: Annotated[list[_RawRollout], msgspec.Meta(max_length=MAX_COMPLETIONS)]  # type: ignore[assignment]


class _Schema(msgspec.Struct):
    schema: int | None = None


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
_heartbeat_decoder = msgspec.msgpack.Decoder(Heartbeat)
_reference_decoder = msgspec.msgpack.Decoder(dict[str, Any])
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
    """Raises `WireError` if the payload is not a valid group of this schema."""
    raw = _decode(_group_decoder, payload, MAX_GROUP_BYTES, GROUP_SCHEMA)
    _expect_schema(raw.schema, GROUP_SCHEMA)
    ticket = _to_ticket(raw.ticket)
    all_tokens, tokens = _arrays([one.tokens for one in raw.rollouts], _INT32, "tokens")
    all_logprobs, logprobs = _arrays([one.behaviour_logprobs for one in raw.rollouts], _FLOAT32, "behaviour_logprobs")
    rollouts = [
        Rollout(tokens[i], one.loss_mask, logprobs[i], one.version_spans, one.reward, one.finish_reason, one.text)
        for i, one in enumerate(raw.rollouts)
    ]
    group = Group(ticket, rollouts, raw.replica, raw.timings)
    check_group(group, (all_tokens, all_logprobs))
    return group


def _to_ticket(raw: _RawTicket) -> Ticket:
    _expect_schema(raw.schema, *READABLE_SCHEMAS)
    num_bytes = memoryview(raw.reference).nbytes
    if num_bytes > MAX_REFERENCE_BYTES:
        raise WireError(f"a reference of {num_bytes} bytes, more than {MAX_REFERENCE_BYTES}")
    try:
        reference = _reference_decoder.decode(raw.reference)
    except _UNDECODABLE as error:
        raise WireError(f"cannot decode the reference: {error}") from error
    return Ticket(**{**msgspec.structs.asdict(raw), "reference": reference, "schema": SCHEMA})


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
