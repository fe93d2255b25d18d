"""Makes the sample of a settled group that people read (headrace/common/wire/group_samples.py), within its bound."""

from bisect import bisect_left
from collections.abc import Sequence

import msgspec
import numpy as np

from headrace.common.wire import Group, Rollout, Turn
from headrace.common.wire.group_samples import (
    MAX_SAMPLE_BYTES,
    MAX_TEXT_CHARS,
    GroupSample,
    RolloutSample,
    SegmentSample,
    TurnSample,
)
from headrace.learner.intake.samples import DecidedGroup, TrainedRollout
from headrace.learner.reporting.token_texts import TokenTexts

OTHER_FIELDS_BYTES = 4096
"""For all fields of a group but its messages, prompts and rollouts."""


def group_sample(decided: DecidedGroup, trained: Sequence[TrainedRollout | None], texts: TokenTexts) -> GroupSample:
    """`trained`: of each rollout, or empty."""
    group, state, step, staleness, decided_s = decided
    ticket, timings = group.ticket, group.timings
    shown = _ShownRollouts(group, texts)
    for rollout, computed in zip(group.rollouts, trained or [None] * len(group.rollouts), strict=True):
        if not shown.add(rollout_sample(rollout, computed, texts)):
            break
    return GroupSample(
        id=ticket.id,
        kind=ticket.kind,
        state=state,
        step=step,
        issued_step=ticket.issued_step,
        staleness=staleness,
        replica=group.replica,
        prompt=ticket.messages,
        rollouts=shown.rollouts,
        leased_s=timings.leased_s,
        sampled_s=timings.sampled_s,
        scored_s=timings.scored_s,
        decided_s=decided_s,
        num_left_out=len(group.rollouts) - len(shown.rollouts),
        prompts=shown.prompts,
    )


class _ShownRollouts:
    """The rollouts and prompts of a group that fit into its sample."""

    def __init__(self, group: Group, texts: TokenTexts) -> None:
        self.rollouts: list[RolloutSample] = []
        self.prompts = [""] * len(group.prompts)
        self._group = group
        self._texts = texts
        self._further: dict[int, str] = {}
        taken = msgspec.json.encode([group.ticket.messages, self.prompts])
        self._num_left = MAX_SAMPLE_BYTES - OTHER_FIELDS_BYTES - len(taken)

    def add(self, rollout: RolloutSample) -> bool:
        """Whether all of it fitted; else its first turns are added, if any fit."""
        num_bytes = self._num_bytes(rollout)
        fitting = rollout
        if num_bytes > self._num_left:
            counts = range(1, len(rollout.turns))
            too_large = bisect_left(
                counts, True, key=lambda count: self._num_bytes(_first_turns(rollout, count)) > self._num_left
            )
            if too_large == 0:
                return False
            fitting = _first_turns(rollout, counts[too_large - 1])
        self._num_left -= self._num_bytes(fitting)
        self.rollouts.append(fitting)
        for place in self._new_prompts(fitting):
            self.prompts[place - 1] = self._prompt(place)
        return fitting is rollout

    def _num_bytes(self, rollout: RolloutSample) -> int:
        prompts = [self._prompt(place) for place in self._new_prompts(rollout)]
        return len(msgspec.json.encode([rollout, prompts]))

    def _new_prompts(self, rollout: RolloutSample) -> set[int]:
        return {one.prompt for one in rollout.segments if one.prompt and not self.prompts[one.prompt - 1]}

    def _prompt(self, place: int) -> str:
        if place not in self._further:
            self._further[place] = shortened(self._texts.joined(self._group.prompts[place - 1].tolist()))
        return self._further[place]


def rollout_sample(rollout: Rollout, trained: TrainedRollout | None, texts: TokenTexts) -> RolloutSample:
    """Of any size. `trained`: None if it was not trained."""
    sample = RolloutSample(
        text=rollout.text,
        reward=rollout.reward,
        advantage=None if trained is None else round(trained.advantage, 4),
        finish_reason=rollout.finish_reason,
        tokens=[],
        versions=[span.version for span in rollout.version_spans for _ in range(span.start, span.end)],
        behaviour_logprobs=_rounded(np.concatenate([segment.behaviour_logprobs for segment in rollout.segments])),
        proximal_logprobs=None if trained is None else _rounded(trained.proximal_logprobs),
        metrics=rollout.metrics,
        failed_episodes=rollout.failed_episodes,
    )
    if not rollout.turns:
        return msgspec.structs.replace(sample, tokens=_sampled_texts(rollout, texts))
    tokens, turns = _conversation(rollout, texts)
    segments = [SegmentSample(segment.origin, segment.prompt) for segment in rollout.segments]
    return msgspec.structs.replace(sample, tokens=tokens, turns=turns, segments=segments)


def _sampled_texts(rollout: Rollout, texts: TokenTexts) -> list[str]:
    return [
        text
        for segment in rollout.segments
        for text, mask in zip(texts(segment.tokens.tolist()), segment.loss_mask, strict=True)
        if mask
    ]


def _conversation(rollout: Rollout, texts: TokenTexts) -> tuple[list[str], list[TurnSample]]:
    """The texts of the sampled tokens, and the turns, each decoded by itself."""
    tokens = [""] * rollout.num_trained_tokens
    places = []
    """Of each segment, how many tokens of the rollout were sampled before each of its own."""
    first = 0
    for segment in rollout.segments:
        sampled = np.cumsum(np.frombuffer(segment.loss_mask, np.uint8), dtype=np.int64)
        places.append([first, *(first + sampled).tolist()])
        first += segment.num_trained_tokens
    turns = []
    for turn in rollout.turns:
        own = rollout.segments[turn.segment].tokens[turn.start : turn.end].tolist()
        start, end = places[turn.segment][turn.start], places[turn.segment][turn.end]
        if turn.role == "assistant":
            tokens[start:end] = texts(own)
        text = "" if turn.role == "assistant" else shortened(texts.joined(own))
        turns.append(_turn_sample(turn, start, end, text))
    return tokens, turns


def _turn_sample(turn: Turn, start: int, end: int, text: str) -> TurnSample:
    return TurnSample(
        role=turn.role,
        segment=turn.segment,
        start=start,
        end=end,
        text=text,
        began_s=turn.began_s,
        ended_s=turn.ended_s,
        cached_tokens=turn.cached_tokens,
    )


def _first_turns(rollout: RolloutSample, count: int) -> RolloutSample:
    turns = rollout.turns[:count]
    end = max(turn.end for turn in turns)
    return msgspec.structs.replace(
        rollout,
        tokens=rollout.tokens[:end],
        versions=rollout.versions[:end],
        behaviour_logprobs=rollout.behaviour_logprobs[:end],
        proximal_logprobs=None if rollout.proximal_logprobs is None else rollout.proximal_logprobs[:end],
        segments=rollout.segments[: max(turn.segment for turn in turns) + 1],
        turns=turns,
        num_turns_left_out=len(rollout.turns) - count,
    )


def shortened(text: str) -> str:
    """Without its middle if it is longer than `MAX_TEXT_CHARS`."""
    if len(text) <= MAX_TEXT_CHARS:
        return text
    half = MAX_TEXT_CHARS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters are left out …\n{text[-half:]}"


def _rounded(logprobs: np.ndarray) -> list[float]:
    found: list[float] = np.round(logprobs.astype(np.float64), 4).tolist()
    return found
