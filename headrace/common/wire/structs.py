"""The messages between services as typed structs: tickets, groups of rollouts, heartbeats.

`schema` names the layout. A rollout is one completion, or an episode of several turns: token sequences (segments) with
a loss mask. Other modules import the structs from `headrace.common.wire`, which decodes and checks them. The bounds
declared here are checked during decoding, before memory is allocated for larger values. No struct can be part of a
reference cycle, so the garbage collector need not traverse all waiting groups (`gc=False`).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np

from headrace.common.wire.uniform_rewards import are_equal_rewards

SCHEMA = 3
"""Schema of tickets and heartbeats; 2 since tickets have `stop`, 3 since they have `tools` and `limits`: an older
replica would silently ignore both."""
READABLE_SCHEMAS = (1, 2, SCHEMA)
"""Schemas that are decoded: an older release may have left tickets in Redis."""
GROUP_SCHEMA = 3
"""3 since a rollout consists of segments."""
READABLE_GROUP_SCHEMAS = (2, GROUP_SCHEMA)
"""Schemas that are decoded: a rollout of schema 2 is one segment behind the ticket's prompt."""

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

MAX_TURNS = 4096
"""Replies of an episode; what stands between them is a turn of its own."""
MAX_SEGMENTS = 1024
MAX_METRICS, MAX_METRIC_CHARS = 64, 100

Message = Annotated[dict[str, Any], msgspec.Meta(max_length=64)]
"""A chat message as in OpenAI's API: `{"role": ..., "content": ...}`, and `tool_calls` or `tool_call_id` where it has
them."""
Role = Literal["system", "user", "assistant", "tool"]

TicketKind = Literal["train", "eval"]
DecidedState = Literal["trained", "uniform", "stale", "evaluated"]
"""The final states of a group."""
TicketState = Literal["open", "answered", DecidedState, "dead", "skipped"]
FinishReason = Literal["stop", "length", "max_turns", "max_tokens", "max_segments", "context"]
"""Why a rollout ended: by itself, at `max_new_tokens`, or at one of its ticket's `Limits`."""
SegmentOrigin = Literal["conversation", "history", "template", "tools"]
"""Why a segment begins: with a new conversation, because the agent rewrote its history, because the chat template drops
text of earlier turns, or because other tools are offered."""
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


class Limits(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Bounds of one episode; at a bound nothing more is sampled, and the environment scores what there is."""

    max_turns: NonNegative
    """Replies."""
    max_tokens: NonNegative
    """Sampled tokens of all replies."""
    max_context_tokens: NonNegative
    """Tokens of a segment, with its prompt."""
    max_segments: NonNegative


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
    tools: list[dict[str, Any]] = []
    """JSON schemas, as OpenAI's `tools`; at most 256 KiB encoded."""
    limits: Limits | None = None
    """Of each episode, for a task with `rollout`, whose prompt may be empty; None: one completion of the prompt."""
    schema: int = SCHEMA


class VersionSpan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Trained tokens `[start, end)` of a segment were sampled by `version`, as the engine reported."""

    version: NonNegative
    start: NonNegative
    end: NonNegative


class Segment(msgspec.Struct, frozen=True, gc=False):
    """One token sequence of a rollout: behind a prompt, what was sampled and what the environment said in between.

    `tokens` (int32) and `loss_mask` (a byte each, 1 for sampled tokens, else 0) have one entry per token after the
    prompt; `behaviour_logprobs` (float32, at the sampling temperature) and `version_spans` cover the tokens whose mask
    is 1, in order. They are arrays, so that a long group is decoded without an object per token.
    """

    tokens: np.ndarray
    loss_mask: bytes
    behaviour_logprobs: np.ndarray
    version_spans: Annotated[list[VersionSpan], msgspec.Meta(max_length=MAX_SEQUENCE_TOKENS)]
    prompt: NonNegative = 0
    """0: the ticket's prompt; n: the n-th of the group's further prompts."""
    origin: SegmentOrigin = "conversation"

    @property
    def num_trained_tokens(self) -> int:
        return len(self.behaviour_logprobs)


class Turn(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Tokens `[start, end)` of a segment, counted behind its prompt: one reply, or the messages between two."""

    role: Role
    """`assistant` for a reply, else the role of the first of the messages."""
    segment: NonNegative
    start: NonNegative
    end: NonNegative
    began_s: Seconds
    ended_s: Seconds
    """Unix times."""
    cached_tokens: NonNegative = 0
    """Of a reply's context, the tokens that the engine found in its prefix cache."""


class Rollout(msgspec.Struct, frozen=True, gc=False):
    """One completion of its group's prompt, or one episode, with its reward.

    Each sampled token stands in exactly one segment, behind exactly the tokens that it was sampled behind.
    """

    segments: Annotated[list[Segment], msgspec.Meta(min_length=1, max_length=MAX_SEGMENTS)]
    """In the order of their first replies."""
    reward: float
    finish_reason: FinishReason
    text: str = ""
    """Of the last reply."""
    turns: Annotated[list[Turn], msgspec.Meta(max_length=2 * MAX_TURNS)] = []
    """Of an episode, by segment and place; empty for one completion."""
    metrics: Annotated[dict[str, float], msgspec.Meta(max_length=MAX_METRICS)] = {}
    """What the task measured besides the reward; never trained on."""
    failed_episodes: NonNegative = 0
    """Episodes that failed before this one."""

    @classmethod
    def of_completion(
        cls,
        *,
        tokens: np.ndarray,
        behaviour_logprobs: np.ndarray,
        version_spans: list[VersionSpan],
        reward: float,
        finish_reason: FinishReason,
        text: str = "",
        metrics: dict[str, float] | None = None,
    ) -> Self:
        """One completion of the ticket's prompt: one segment, all of it sampled."""
        segment = Segment(tokens, b"\1" * len(tokens), behaviour_logprobs, version_spans)
        return cls([segment], reward, finish_reason, text, metrics=metrics or {})

    @property
    def num_trained_tokens(self) -> int:
        return sum([segment.num_trained_tokens for segment in self.segments])

    @property
    def version_spans(self) -> list[VersionSpan]:
        """Of all segments; each counts its own tokens."""
        return [span for segment in self.segments for span in segment.version_spans]

    @property
    def is_truncated(self) -> bool:
        """Whether it reached a limit."""
        return self.finish_reason != "stop"


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
    prompts: Annotated[list[np.ndarray], msgspec.Meta(max_length=MAX_COMPLETIONS)] = []
    """Prompts of segments, int32, besides the ticket's: distinct, each used by at least one."""
    schema: int = GROUP_SCHEMA

    def prompt(self, segment: Segment) -> Sequence[int] | np.ndarray:
        """The tokens before the segment's first sampled token."""
        return self.prompts[segment.prompt - 1] if segment.prompt else self.ticket.prompt_tokens

    @property
    def segments(self) -> list[Segment]:
        """Of all rollouts."""
        return [segment for rollout in self.rollouts for segment in rollout.segments]

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.rollouts]

    def trainable_rollouts(self, truncated: Literal["train", "mask"]) -> list[Rollout]:
        """The rollouts that are trained on; with "mask" those that reached a limit are left out."""
        return [rollout for rollout in self.rollouts if truncated == "train" or not rollout.is_truncated]

    def is_uniform(self, truncated: Literal["train", "mask"]) -> bool:
        """Whether the raw rewards of the trainable rollouts are equal up to rounding, or there are none.

        Such a group has no learning signal (dynamic sampling).
        """
        rewards = [rollout.reward for rollout in self.trainable_rollouts(truncated)]
        return not rewards or bool(are_equal_rewards(min(rewards), max(rewards)))

    @property
    def oldest_version(self) -> int:
        return min([span.version for segment in self.segments for span in segment.version_spans])

    @property
    def newest_version(self) -> int:
        return max([span.version for segment in self.segments for span in segment.version_spans])

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
