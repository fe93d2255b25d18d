"""Episodes for tests: turns by a loss mask, and rollouts cut into segments that repeat their context."""

from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np
from msgspec.structs import replace

from headrace.common.wire import Group, Limits, Rollout, Segment, Turn, VersionSpan

LIMITS = Limits(max_turns=32, max_tokens=256, max_context_tokens=512, max_segments=16)


def reply_starts(rollout: Rollout) -> list[int]:
    """Where the replies of a rollout of one segment begin, but the first."""
    mask = rollout.segments[0].loss_mask
    return [place for place in range(1, len(mask)) if mask[place] and not mask[place - 1]]


def turns_of(segments: Sequence[Segment]) -> list[Turn]:
    """Of each run of the masks: a reply where it is 1, else a user's message; each takes a second."""
    found: list[Turn] = []
    for index, segment in enumerate(segments):
        place = 0
        for is_reply, run in groupby(segment.loss_mask):
            end, at = place + len(list(run)), float(len(found))
            found.append(Turn("assistant" if is_reply else "user", index, place, end, at, at + 1, place * is_reply))
            place = end
    return found


def as_episodes(group: Group, cuts: Sequence[Sequence[int]], limits: Limits = LIMITS) -> Group:
    """The group with its rollouts of one segment as episodes: the n-th is cut where its replies at `cuts[n]` begin, and
    each further segment has all of the conversation before it as its prompt. The same prompts are one."""
    prompts: dict[bytes, int] = {}
    rollouts = []
    for rollout, places in zip(group.rollouts, cuts, strict=True):
        (whole,) = rollout.segments
        segments = []
        for start, end in pairwise([0, *places, len(whole.tokens)]):
            before = np.array([*group.ticket.prompt_tokens, *whole.tokens[:start]], np.int32).tobytes()
            prompt = prompts.setdefault(before, len(prompts) + 1) if start else 0
            segments.append(part_of(whole, start, end, prompt))
        rollouts.append(replace(rollout, segments=segments, turns=turns_of(segments)))
    further = [np.frombuffer(prompt, np.int32) for prompt in prompts]
    return replace(group, ticket=replace(group.ticket, limits=limits), rollouts=rollouts, prompts=further)


def part_of(whole: Segment, start: int, end: int, prompt: int) -> Segment:
    """Tokens `[start, end)` of a segment, as a segment behind another prompt."""
    first, last = whole.loss_mask[:start].count(1), whole.loss_mask[:end].count(1)
    spans = [(span.version, max(span.start, first), min(span.end, last)) for span in whole.version_spans]
    return Segment(
        tokens=whole.tokens[start:end],
        loss_mask=whole.loss_mask[start:end],
        behaviour_logprobs=whole.behaviour_logprobs[first:last],
        version_spans=[VersionSpan(version, a - first, b - first) for version, a, b in spans if a < b],
        prompt=prompt,
    )
