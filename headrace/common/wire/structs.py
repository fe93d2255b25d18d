"""The messages between services as typed structs: tickets, groups of rollouts, heartbeats.

`schema` names the layout. A rollout is token ids with a loss mask, so several turns with tool output between them need
no other format. Other modules import the structs from `headrace.common.wire`, which decodes and checks them. The bounds
declared here are checked during decoding, before memory is allocated for larger values. No struct can be part of a
reference cycle, so the garbage collector need not traverse all waiting groups (`gc=False`).
"""

from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from headrace.common.wire.uniform_rewards import are_equal_rewards

SCHEMA = 2
"""Schema of tickets and heartbeats; 2 since tickets have `stop`, which an older replica would silently ignore."""
READABLE_SCHEMAS = (1, SCHEMA)
"""Schemas that are decoded: an older release may have left tickets in Redis, which stop only at end tokens."""
GROUP_SCHEMA = 2
"""2 since tokens and masks of rollouts are arrays of bytes."""

MAX_TOKEN = 2**31 - 1
MAX_VERSION = 2**53 - 1
"""Also the largest value of every other counter: up to here JSON and float64 are exact."""
MAX_REPORTED_VERSION = 2**52
"""Largest version in a heartbeat. The learner publishes above reported versions, so there must be higher ones."""
MAX_UNIX_S = 2.5e11
"""A time in the year 9892; Python has no calendar dates much later."""
MAX_SEQUENCE_TOKENS = 2**20
MAX_COMPLETIONS = 4096
MAX_STOPS, MAX_STOP_CHARS = 32, 60
"""SGLang accepts 32 patterns of 256 bytes and searches for each of them after every token."""

Message = Annotated[dict[str, str], msgspec.Meta(max_length=64)]
"""A chat message: `{"role": ..., "content": ...}`."""

TicketKind = Literal["train", "eval"]
DecidedState = Literal["trained", "uniform", "stale", "evaluated"]
"""The final states of a group."""
TicketState = Literal["open", "answered", DecidedState, "dead", "skipped"]
FinishReason = Literal["stop", "length"]
ReplicaState = Literal["starting", "running", "paused", "draining", "quarantined"]

NonNegative = Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_UNIX_S)]
Tokens = Annotated[list[int], msgspec.Meta(max_length=MAX_SEQUENCE_TOKENS)]


class Sampling(msgspec.Struct, frozen=True, gc=False):
    """How a ticket is to be sampled. The learner divides its logits by the same `temperature`."""

    temperature: float
    max_new_tokens: int
    stop_token_ids: Annotated[list[int], msgspec.Meta(max_length=4096)]
    stop: Annotated[
        list[Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_CHARS)]], msgspec.Meta(max_length=MAX_STOPS)
    ] = []
    """Texts that also end a completion; the token that completes such a text is the completion's last."""


class Ticket(msgspec.Struct, frozen=True, gc=False):
    """One prompt to be answered by one group: everything a stateless replica needs."""

    id: str
    kind: TicketKind
    prompt_tokens: Tokens
    messages: Annotated[list[Message], msgspec.Meta(max_length=4096)]
    reference: dict[str, Any]
    """What the reward needs besides the completion: JSON values, at most 1 MiB encoded."""
    num_completions: int
    sampling: Sampling
    min_weight_version: NonNegative
    """A replica below this version swaps first, then samples."""
    issued_step: NonNegative = 0
    reissues: NonNegative = 0
    """How often this prompt was issued again because its group had become stale."""
    attempts: NonNegative = 0
    """Failed attempts so far; a hand-back on a drain does not count."""
    avoid: Annotated[list[str], msgspec.Meta(max_length=4096)] = []
    """Replicas that failed on this ticket."""
    interruptions: NonNegative = 0
    """How often an engine died or fell silent while it had this ticket."""
    schema: int = SCHEMA


class VersionSpan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Trained tokens `[start, end)` of a rollout were sampled by `version`, as the engine reported."""

    version: NonNegative
    start: NonNegative
    end: NonNegative


class Rollout(msgspec.Struct, frozen=True, gc=False):
    """One completion after its group's prompt, with its reward.

    `tokens` (int32) and `loss_mask` (a byte each, 1 or 0) have one entry per token after the prompt;
    `behaviour_logprobs` (float32, at the sampling temperature) and `version_spans` cover the tokens whose mask is 1, in
    order. They are arrays, so that a long group is decoded without an object per token.
    """

    tokens: np.ndarray
    loss_mask: bytes
    behaviour_logprobs: np.ndarray
    version_spans: Annotated[list[VersionSpan], msgspec.Meta(max_length=MAX_SEQUENCE_TOKENS)]
    reward: float
    finish_reason: FinishReason
    text: str = ""

    @property
    def num_trained_tokens(self) -> int:
        return len(self.behaviour_logprobs)


class Timings(msgspec.Struct, frozen=True, gc=False):
    """Unix times, in seconds, of a group's way through a replica."""

    leased_s: Seconds
    sampled_s: Seconds
    scored_s: Seconds


class Group(msgspec.Struct, frozen=True, gc=False):
    """A ticket with its scored rollouts."""

    ticket: Ticket
    rollouts: Annotated[list[Rollout], msgspec.Meta(max_length=MAX_COMPLETIONS)]
    replica: str
    timings: Timings
    schema: int = GROUP_SCHEMA

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.rollouts]

    def trainable_rollouts(self, truncated: Literal["train", "mask"]) -> list[Rollout]:
        """The rollouts that are trained on; with "mask" those that reached max_new_tokens are left out."""
        return [rollout for rollout in self.rollouts if truncated == "train" or rollout.finish_reason != "length"]

    def is_uniform(self, truncated: Literal["train", "mask"]) -> bool:
        """Whether the raw rewards of the trainable rollouts are equal up to rounding, or there are none.

        Such a group has no learning signal (dynamic sampling).
        """
        rewards = [rollout.reward for rollout in self.trainable_rollouts(truncated)]
        return not rewards or bool(are_equal_rewards(min(rewards), max(rewards)))

    @property
    def oldest_version(self) -> int:
        return min([span.version for rollout in self.rollouts for span in rollout.version_spans])

    @property
    def newest_version(self) -> int:
        return max([span.version for rollout in self.rollouts for span in rollout.version_spans])

    @property
    def num_trained_tokens(self) -> int:
        return sum(rollout.num_trained_tokens for rollout in self.rollouts)


class Heartbeat(msgspec.Struct, frozen=True):
    """A replica's report about itself, every second or two, under a key that expires."""

    replica: str
    url: str
    state: ReplicaState
    reason: str
    weight_version: Annotated[int, msgspec.Meta(ge=0, le=MAX_REPORTED_VERSION)]
    groups_in_flight: NonNegative
    groups_committed: NonNegative
    tokens_generated: NonNegative
    waiting_s: Seconds
    """Seconds without any group in flight, since the replica began to serve."""
    serving_s: Seconds
    schema: int = SCHEMA
    waits: Annotated[dict[Annotated[str, msgspec.Meta(max_length=64)], Seconds], msgspec.Meta(max_length=64)] = {}
    """Seconds by reason (headrace/common/process/waiting.py), the longest first."""
    shares_memory: bool = False
    """The replica uses a version's file in the learner's memory-backed folder, without a delta or a copy."""
