"""What travels between services: tickets, groups of rollouts, heartbeats.

Typed msgspec structs in msgpack, never pickle. `schema` names the layout, and a payload is validated once,
here, where it enters a process: after `decode_*` every length and span is known to fit. A rollout is token
ids with a loss mask over them, so that several turns with tool output in between need no other format.
"""

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np

SCHEMA = 1

Message = dict[str, str]
"""A chat message: `{"role": ..., "content": ...}`."""

TicketKind = Literal["train", "eval"]
TicketState = Literal["open", "queued", "trained", "uniform", "stale", "evaluated", "dead"]

NonNegative = Annotated[int, msgspec.Meta(ge=0)]


class WireError(ValueError):
    """A payload that cannot be decoded or contradicts itself; the text says what and where."""


class Sampling(msgspec.Struct, frozen=True):
    """How a ticket is to be sampled. The learner divides its logits by the same `temperature`."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: list[int]


class Ticket(msgspec.Struct, frozen=True):
    """One prompt to be answered by one group: everything a stateless replica needs."""

    id: str
    kind: TicketKind
    prompt_tokens: list[int]
    messages: list[Message]
    reference: dict[str, Any]
    """What the reward needs besides the completion."""
    num_completions: int
    sampling: Sampling
    min_weight_version: NonNegative
    """A replica below this version swaps first, then samples."""
    issued_step: NonNegative = 0
    reissues: NonNegative = 0
    """How often the same prompt was replaced because its group had become stale."""
    attempts: NonNegative = 0
    """Failed attempts so far; a hand-back on a drain is none."""
    avoid: list[str] = []
    """Replicas that failed on this ticket."""
    schema: int = SCHEMA


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Trained tokens `[start, end)` of a rollout were sampled by `version`, as the engine reported."""

    version: NonNegative
    start: NonNegative
    end: NonNegative


class Rollout(msgspec.Struct, frozen=True):
    """One completion after its group's prompt, with its reward.

    `tokens` and `loss_mask` have one entry per token after the prompt; `behaviour_logprobs` (float32, at the
    sampling temperature) and `version_spans` cover the tokens whose mask is 1, in order.
    """

    tokens: list[int]
    loss_mask: list[int]
    behaviour_logprobs: np.ndarray
    version_spans: list[VersionSpan]
    reward: float
    finish_reason: Literal["stop", "length"]
    text: str = ""

    @property
    def num_trained_tokens(self) -> int:
        return len(self.behaviour_logprobs)

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.version_spans)

    @property
    def newest_version(self) -> int:
        return max(span.version for span in self.version_spans)


class Timings(msgspec.Struct, frozen=True):
    """Unix times, in seconds, of a group's way through a replica."""

    leased_s: float
    sampled_s: float
    scored_s: float


class Group(msgspec.Struct, frozen=True):
    """A ticket with its scored rollouts."""

    ticket: Ticket
    rollouts: list[Rollout]
    replica: str
    timings: Timings
    schema: int = SCHEMA

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.rollouts]

    @property
    def is_uniform(self) -> bool:
        """All raw rewards are equal, so that the group carries no signal (dynamic sampling)."""
        return len(set(self.rewards)) == 1

    @property
    def oldest_version(self) -> int:
        return min(rollout.oldest_version for rollout in self.rollouts)

    @property
    def newest_version(self) -> int:
        return max(rollout.newest_version for rollout in self.rollouts)

    @property
    def num_trained_tokens(self) -> int:
        return sum(rollout.num_trained_tokens for rollout in self.rollouts)


class Heartbeat(msgspec.Struct, frozen=True):
    """What a replica says of itself every second or two, under a key that expires."""

    replica: str
    url: str
    state: Literal["starting", "running", "paused", "draining", "quarantined"]
    reason: str
    weight_version: NonNegative
    groups_in_flight: int
    groups_committed: int
    tokens_generated: int
    waiting_s: float
    """Seconds without any group in flight, since the replica began to serve."""
    serving_s: float
    schema: int = SCHEMA


Payload = TypeVar("Payload", Ticket, Group, Heartbeat)


def _encode_array(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        return value.astype("<f4", copy=False).tobytes()
    raise NotImplementedError(f"{type(value).__name__} has no wire form")


def _decode_array(expected: type, value: object) -> np.ndarray:
    if expected is np.ndarray and isinstance(value, bytes) and len(value) % 4 == 0:
        return np.frombuffer(value, dtype="<f4")
    raise ValueError(f"expected a multiple of 4 bytes of float32, got {type(value).__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_ticket_decoder = msgspec.msgpack.Decoder(Ticket)
_group_decoder = msgspec.msgpack.Decoder(Group, dec_hook=_decode_array)
_heartbeat_decoder = msgspec.msgpack.Decoder(Heartbeat)


def encode(value: Ticket | Group | Heartbeat) -> bytes:
    return _encoder.encode(value)


def decode_ticket(payload: bytes) -> Ticket:
    """Raises `WireError` if the payload is no ticket of this schema."""
    ticket = _decode(_ticket_decoder, payload)
    _expect(len(ticket.prompt_tokens) > 0, f"ticket {ticket.id} has no prompt tokens")
    _expect(ticket.num_completions > 0, f"ticket {ticket.id} asks for {ticket.num_completions} completions")
    return ticket


def decode_heartbeat(payload: bytes) -> Heartbeat:
    """Raises `WireError` if the payload is no heartbeat of this schema."""
    return _decode(_heartbeat_decoder, payload)


def decode_group(payload: bytes) -> Group:
    """Raises `WireError` if the payload is no group of this schema or its parts do not fit together."""
    group = _decode(_group_decoder, payload)
    check_group(group)
    return group


def check_group(group: Group) -> None:
    """Raises `WireError` naming the ticket and what does not fit."""
    name = group.ticket.id
    expected = group.ticket.num_completions
    _expect(len(group.rollouts) == expected, f"group {name} has {len(group.rollouts)} rollouts, expected {expected}")
    for index, rollout in enumerate(group.rollouts):
        problem = _rollout_problem(rollout)
        _expect(not problem, f"group {name}, rollout {index}: {problem}")


def _rollout_problem(rollout: Rollout) -> str:
    num_trained = sum(rollout.loss_mask)
    if len(rollout.loss_mask) != len(rollout.tokens):
        return f"{len(rollout.loss_mask)} mask entries for {len(rollout.tokens)} tokens"
    if any(bit not in (0, 1) for bit in rollout.loss_mask):
        return "loss_mask has values other than 0 and 1"
    if num_trained == 0:
        return "no trained token"
    if len(rollout.behaviour_logprobs) != num_trained:
        return f"{len(rollout.behaviour_logprobs)} behaviour_logprobs for {num_trained} trained tokens"
    if not np.isfinite(rollout.behaviour_logprobs).all() or not math.isfinite(rollout.reward):
        return "a behaviour log-probability or the reward is not finite"
    if (rollout.behaviour_logprobs > 1e-3).any():
        return f"behaviour log-probability {rollout.behaviour_logprobs.max():.4f} is above 0"
    edges = [0, *(span.end for span in rollout.version_spans)]
    starts = [span.start for span in rollout.version_spans]
    if starts != edges[:-1] or edges[-1] != num_trained or any(start >= end for start, end in pairwise(edges)):
        spans = [(span.version, span.start, span.end) for span in rollout.version_spans]
        return f"version spans {spans} do not tile {num_trained} tokens"
    return ""


def _decode(decoder: msgspec.msgpack.Decoder[Payload], payload: bytes) -> Payload:
    try:
        value = decoder.decode(payload)
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError) as error:
        raise WireError(f"cannot decode {len(payload)} bytes: {error}") from error
    _expect(value.schema == SCHEMA, f"schema {value.schema}, expected {SCHEMA}")
    return value


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise WireError(problem)
