"""From a batch of groups to micro-batches of a token budget: pure functions on numpy arrays.

A mini-batch has whole groups or a part of each. A micro-batch has the rollouts of a group next to each other, behind
one copy of their prompt (shared_prefix.py); only attention has padding.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from headrace.common.config import ActorConfig
from headrace.common.wire import Group, Rollout, Segment
from headrace.learner.algorithm.staleness import version_staleness
from headrace.learner.model.shared_prefix import Layout


@dataclass(frozen=True)
class Sample:
    """One segment of a rollout. `advantage` is the rollout's; `token_staleness` is `(n,)` int64, in steps."""

    group: Group
    rollout: Rollout
    segment: Segment
    advantage: float
    token_staleness: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.group.prompt(self.segment)) + len(self.segment.tokens)


@dataclass(frozen=True)
class MicroBatch:
    """B rollouts in one row of T tokens, of which N are trained. `sequence_offsets` splits arrays of length N by
    rollout."""

    input_ids: np.ndarray
    """`(1, T)` int64."""
    layout: Layout
    """Where each prompt and completion is in the row."""
    positions: np.ndarray
    """`(N,)` int64: the index in the row of the token that predicts each trained token; for a completion's first token
    that is the prompt's last."""
    targets: np.ndarray
    """`(N,)` int64."""
    behaviour_logprobs: np.ndarray
    """`(N,)` float32."""
    temperature: np.ndarray
    """`(N,)` float32."""
    token_staleness: np.ndarray
    """`(N,)` int64, in steps."""
    advantages: np.ndarray
    """`(B,)` float32."""
    sequence_offsets: np.ndarray
    """`(B + 1,)` int64."""
    rows: Sequence[Sample]

    @property
    def num_sequences(self) -> int:
        return len(self.advantages)

    @property
    def num_trained_tokens(self) -> int:
        return len(self.targets)


def current_version(step: int, version_steps: Mapping[int, int]) -> int | None:
    """The version of the weights after `step` steps, None if the map has none. Version numbers only grow, also over
    restarts."""
    return max((version for version, made_by in list(version_steps.items()) if made_by == step), default=None)


def token_staleness(segment: Segment, step: int, version_steps: Mapping[int, int], current: int | None) -> np.ndarray:
    """Steps since the version that sampled each trained token was made, `(n,)` int64.

    0 means a fresh token, sampled by `current`, the version after `step` steps. Tokens of other versions count at least
    1: an earlier start of the learner may have published other weights for the same or a later step.
    """
    parts = []
    for span in segment.version_spans:
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
    of the prompt per completion. A longer sample gets a micro-batch of its own."""
    return [_micro_batch(rows) for rows in _within_budget(longest_groups_first(samples), max_tokens)]


def longest_groups_first(samples: Sequence[Sample]) -> list[Sample]:
    """The order of packing: groups by their longest sample, so that samples of similar length are adjacent."""
    longest: dict[str, int] = {}
    for sample in samples:
        name = sample.group.ticket.id
        longest[name] = max(longest.get(name, 0), sample.num_tokens)
    return sorted(samples, key=lambda sample: (-longest[sample.group.ticket.id], sample.group.ticket.id))


def _within_budget(samples: list[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    rows: list[Sample] = []
    width = 0
    for sample in samples:
        width_with = max(width, sample.num_tokens)
        if rows and width_with * (len(rows) + 1) > max_tokens:
            yield rows
            rows, width_with = [], sample.num_tokens
        rows.append(sample)
        width = width_with
    if rows:
        yield rows


def _micro_batch(rows: list[Sample]) -> MicroBatch:
    groups = [list(one) for _, one in groupby(rows, lambda sample: sample.group.ticket.id)]
    layout = Layout(
        [len(one[0].group.ticket.prompt_tokens) for one in groups],
        [[len(sample.segment.tokens) for sample in one] for one in groups],
    )
    input_ids = np.concatenate(
        [part for one in groups for part in (one[0].group.ticket.prompt_tokens, *(s.segment.tokens for s in one))]
    ).astype(np.int64)
    positions, targets, counts = [], [], [0]
    for sample, (prompt, completion) in zip(rows, layout.spans, strict=True):
        trained = np.flatnonzero(np.frombuffer(sample.segment.loss_mask, np.uint8))
        positions.append(np.where(trained > 0, completion.start + trained - 1, prompt.stop - 1))
        targets.append(input_ids[completion.start + trained])
        counts.append(len(trained))
    return MicroBatch(
        input_ids=input_ids[None],
        layout=layout,
        positions=np.concatenate(positions),
        targets=np.concatenate(targets),
        behaviour_logprobs=np.concatenate([sample.segment.behaviour_logprobs for sample in rows]),
        temperature=np.repeat(
            np.array([sample.group.ticket.sampling.temperature for sample in rows], np.float32), counts[1:]
        ),
        token_staleness=np.concatenate([sample.token_staleness for sample in rows]),
        advantages=np.array([sample.advantage for sample in rows], np.float32),
        sequence_offsets=np.cumsum(counts),
        rows=rows,
    )
