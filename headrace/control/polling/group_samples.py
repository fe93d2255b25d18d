"""Keeps the newest group samples that the learner has published, for people to read.

Only the summary of a group is decoded until somebody opens it. Memory is bounded; the oldest groups are dropped first.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from headrace.common.redis.keys import MAX_SAMPLES
from headrace.common.wire import name_problem
from headrace.common.wire.group_samples import MAX_SAMPLE_BYTES, GroupSample, RolloutSample, TurnSample
from headrace.control.models.groups import GroupDetail, GroupSummary, Rollout, Segment, Turn
from headrace.control.polling.redis_poll import Entry

MAX_KEPT_BYTES = 64 << 20
MAX_PROMPT_CHARS = 200


class _CachedSample(NamedTuple):
    summary: GroupSummary
    payload: bytes


class GroupSamples:
    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[str, _CachedSample] = OrderedDict()
        """Samples by id, the newest last."""

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, entry: Entry) -> GroupSummary | None:
        payload = entry[1].get(b"group", b"")
        group = _decode(payload)
        if group is None:
            return None
        if (before := self._kept.pop(group.id, None)) is not None:
            self._num_bytes -= len(before.payload)
        self._kept[group.id] = _CachedSample(_summary(group), payload)
        self._num_bytes += len(payload)
        while len(self._kept) > MAX_SAMPLES or (self._num_bytes > self._max_bytes and len(self._kept) > 1):
            self._num_bytes -= len(self._kept.popitem(last=False)[1].payload)
        return self._kept[group.id].summary

    def newest(self, is_wanted: Callable[[GroupSummary], bool]) -> Iterator[GroupSummary]:
        return (kept.summary for kept in reversed(self._kept.values()) if is_wanted(kept.summary))

    def detail(self, name: str) -> GroupDetail | None:
        kept = self._kept.get(name)
        group = None if kept is None else _decode(kept.payload)
        return None if kept is None or group is None else _detail(kept.summary, group)


def _decode(payload: bytes) -> GroupSample | None:
    if len(payload) > 2 * MAX_SAMPLE_BYTES:
        return None
    try:
        group = msgspec.json.decode(payload, type=GroupSample)
    except (ValueError, RecursionError):
        return None
    return None if name_problem(group.id) else group


def _summary(group: GroupSample) -> GroupSummary:
    question = group.prompt[-1].get("content") if group.prompt else None
    return GroupSummary(
        id=group.id,
        kind=group.kind,
        state=group.state,
        step=group.step,
        staleness=group.staleness,
        replica=group.replica,
        rewards=[rollout.reward for rollout in group.rollouts],
        num_tokens=sum(len(rollout.tokens) for rollout in group.rollouts),
        prompt=question[-MAX_PROMPT_CHARS:] if isinstance(question, str) else "",
        decided_at=group.decided_s,
    )


def _detail(summary: GroupSummary, group: GroupSample) -> GroupDetail:
    return GroupDetail(
        **summary.model_dump(),
        messages=group.prompt,
        prompts=group.prompts,
        rollouts=[_rollout(rollout) for rollout in group.rollouts],
        issued_step=group.issued_step,
        leased_at=group.leased_s,
        sampled_at=group.sampled_s,
        scored_at=group.scored_s,
        num_omitted=group.num_left_out,
    )


def _rollout(sample: RolloutSample) -> Rollout:
    return Rollout(
        text=sample.text,
        reward=sample.reward,
        advantage=sample.advantage,
        finish_reason=sample.finish_reason,
        tokens=sample.tokens,
        weight_versions=sample.versions,
        behaviour_logprobs=sample.behaviour_logprobs,
        proximal_logprobs=sample.proximal_logprobs,
        segments=[Segment(origin=one.origin, prompt=one.prompt) for one in sample.segments],
        turns=[_turn(one) for one in sample.turns],
        metrics=sample.metrics,
        failed_episodes=sample.failed_episodes,
        num_omitted_turns=sample.num_turns_left_out,
    )


def _turn(sample: TurnSample) -> Turn:
    return Turn(
        role=sample.role,
        segment=sample.segment,
        start=sample.start,
        end=sample.end,
        text=sample.text,
        began_at=sample.began_s,
        ended_at=sample.ended_s,
        cached_tokens=sample.cached_tokens,
    )
