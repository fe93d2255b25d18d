"""From a batch of groups to micro-batches of a token budget: pure functions on numpy arrays.

A mini-batch has whole groups or a part of each. A rollout is one sequence of the loss, whatever its number of segments,
and is never divided between micro-batches. A forward pass has segments with the same prompt next to each other, behind
one copy of it (shared_prefix.py); only attention has padding.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from headrace.common.config import ActorConfig
from headrace.common.wire import Group, Rollout, Segment
from headrace.learner.algorithm.staleness import version_staleness
from headrace.learner.model.shared_prefix import Layout


@dataclass(frozen=True)
class Sample:
    """A rollout with its advantage: one sequence of the loss."""

    group: Group
    rollout: Rollout
    advantage: float
    token_staleness: np.ndarray
    """`(n,)` int64, in steps: of the trained tokens of its segments, one segment after another."""

    @cached_property
    def widths(self) -> list[int]:
        """Of each segment, its number of tokens with its prompt."""
        return [len(self.group.prompt(segment)) + len(segment.tokens) for segment in self.rollout.segments]

    @property
    def num_tokens(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class Pass:
    """What one forward pass computes: a row of T tokens with one or more segments, of which n tokens are trained."""

    input_ids: np.ndarray
    """`(1, T)` int64."""
    layout: Layout
    """Where each prompt and segment is in the row."""
    positions: np.ndarray
    """`(n,)` int64: the index in the row of the token that predicts each trained token; for a segment's first token
    that is the prompt's last."""
    targets: np.ndarray
    """`(n,)` int64."""
    temperature: np.ndarray
    """`(n,)` float32."""


@dataclass(frozen=True)
class MicroBatch:
    """B rollouts with N trained tokens, one rollout after another, each segment by segment. `sequence_offsets` splits
    arrays of length N by rollout."""

    passes: Sequence[Pass]
    """Their trained tokens, joined, are the N. There are several only for a single rollout of more segments than the
    budget has room for."""
    behaviour_logprobs: np.ndarray
    """`(N,)` float32."""
    token_staleness: np.ndarray
    """`(N,)` int64, in steps."""
    advantages: np.ndarray
    """`(B,)` float32."""
    sequence_offsets: np.ndarray
    """`(B + 1,)` int64."""
    samples: Sequence[Sample]

    @property
    def num_sequences(self) -> int:
        return len(self.advantages)

    @property
    def num_trained_tokens(self) -> int:
        return len(self.behaviour_logprobs)


def current_version(step: int, version_steps: Mapping[int, int]) -> int | None:
    """The version of the weights after `step` steps, None if the map has none. Version numbers only grow, also over
    restarts."""
    return max((version for version, made_by in list(version_steps.items()) if made_by == step), default=None)


def token_staleness(rollout: Rollout, step: int, version_steps: Mapping[int, int], current: int | None) -> np.ndarray:
    """Steps since the version that sampled each trained token was made, `(n,)` int64, over all segments.

    0 means a fresh token, sampled by `current`, the version after `step` steps. Tokens of other versions count at least
    1: an earlier start of the learner may have published other weights for the same or a later step.
    """
    parts = []
    for span in rollout.version_spans:
        lowest = 0 if span.version == current else 1
        staleness = max(lowest, version_staleness(span.version, step, version_steps))
        parts.append(np.full(span.end - span.start, staleness, np.int64))
    return np.concatenate(parts)


def split_mini_batches(samples: Sequence[Sample], settings: ActorConfig, seed: str) -> list[list[Sample]]:
    """Splits whole groups, shuffled by `seed`, so that mini-batches differ by at most one group. With
    `mini_batch_split: completions` it shuffles each group's samples and deals them out, so that mini-batches differ by
    at most one sample, in total and per group."""
    by_group: dict[str, list[Sample]] = {}
    for sample in samples:
        by_group.setdefault(sample.group.ticket.id, []).append(sample)
    groups, num_mini_batches, rng = list(by_group.values()), settings.num_mini_batches, random.Random(seed)
    rng.shuffle(groups)
    if settings.mini_batch_split == "completions":
        shuffled = [sample for group in groups for sample in rng.sample(group, len(group))]
        return [shuffled[start::num_mini_batches] for start in range(num_mini_batches)]
    bounds = [len(groups) * i // num_mini_batches for i in range(num_mini_batches + 1)]
    return [[sample for group in groups[start:end] for sample in group] for start, end in pairwise(bounds)]


def pack(samples: Sequence[Sample], max_tokens: int) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens` tokens, counted as attention computes them: with padding and with one copy
    of the prompt per segment. A rollout that alone is longer gets a micro-batch of its own, of several passes that keep
    the budget; a segment that alone is longer gets a pass of its own."""
    ordered = longest_groups_first(samples)
    parts = _within_budget([sample.widths for sample in ordered], max_tokens)
    return [_micro_batch(ordered[start:end], max_tokens) for start, end in parts]


def longest_groups_first(samples: Sequence[Sample]) -> list[Sample]:
    """The order of packing: groups by their longest segment, so that segments of similar length are adjacent."""
    longest: dict[str, int] = {}
    for sample in samples:
        name = sample.group.ticket.id
        longest[name] = max(longest.get(name, 0), *sample.widths)
    return sorted(samples, key=lambda sample: (-longest[sample.group.ticket.id], sample.group.ticket.id))


def _within_budget(widths: Sequence[Sequence[int]], max_tokens: int) -> Iterator[tuple[int, int]]:
    """Consecutive items, from the first to before the last, that fit together; `widths`: of the rows of each item."""
    start, num_rows, width = 0, 0, 0
    for index, own in enumerate(widths):
        num_rows, width = num_rows + len(own), max(width, *own)
        if index > start and width * num_rows > max_tokens:
            yield start, index
            start, num_rows, width = index, len(own), max(own)
    if widths:
        yield start, len(widths)


def _micro_batch(samples: list[Sample], max_tokens: int) -> MicroBatch:
    rows = [(sample, segment) for sample in samples for segment in sample.rollout.segments]
    widths = [[width] for sample in samples for width in sample.widths]
    counts = [sample.rollout.num_trained_tokens for sample in samples]
    return MicroBatch(
        passes=[_pass(rows[start:end]) for start, end in _within_budget(widths, max_tokens)],
        behaviour_logprobs=np.concatenate([segment.behaviour_logprobs for _, segment in rows]),
        token_staleness=np.concatenate([sample.token_staleness for sample in samples]),
        advantages=np.array([sample.advantage for sample in samples], np.float32),
        sequence_offsets=np.cumsum([0, *counts]),
        samples=samples,
    )


def _pass(rows: list[tuple[Sample, Segment]]) -> Pass:
    """Segments that share a prompt stand together in the row; trained tokens are in the order of `rows`."""
    by_prompt: dict[tuple[str, int], list[int]] = {}
    for index, (sample, segment) in enumerate(rows):
        by_prompt.setdefault((sample.group.ticket.id, segment.prompt), []).append(index)
    sharing = list(by_prompt.values())
    prompts = [rows[first][0].group.prompt(rows[first][1]) for first, *_ in sharing]
    layout = Layout([len(prompt) for prompt in prompts], [[len(rows[i][1].tokens) for i in some] for some in sharing])
    input_ids = np.concatenate(
        [
            part
            for prompt, some in zip(prompts, sharing, strict=True)
            for part in (prompt, *(rows[i][1].tokens for i in some))
        ]
    ).astype(np.int64)
    spans = dict(zip((index for some in sharing for index in some), layout.spans, strict=True))
    positions, targets = [], []
    for index, (_, segment) in enumerate(rows):
        prompt, completion = spans[index]
        trained = np.flatnonzero(np.frombuffer(segment.loss_mask, np.uint8))
        positions.append(np.where(trained > 0, completion.start + trained - 1, prompt.stop - 1))
        targets.append(input_ids[completion.start + trained])
    temperatures = np.array([sample.group.ticket.sampling.temperature for sample, _ in rows], np.float32)
    return Pass(
        input_ids=input_ids[None],
        layout=layout,
        positions=np.concatenate(positions),
        targets=np.concatenate(targets),
        temperature=np.repeat(temperatures, [len(some) for some in targets]),
    )
