"""Splits a batch among ranks by tokens, and merges the ranks' results.

Pure functions of the batch: every rank computes the whole split and takes its share, so that ranks need not communicate
for it. Forward and backward passes are collective, so every rank does as many as the one with the most micro-batches;
the others pad with empty micro-batches and passes, which add exactly 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from headrace.learner.algorithm.loss import PolicyLoss
from headrace.learner.model.packing import MicroBatch, Pass, Sample, longest_groups_first, pack
from headrace.learner.model.shared_prefix import Layout

EMPTY_PASS = Pass(
    input_ids=np.zeros((1, 1), np.int64),
    layout=Layout([1], [[0]]),
    positions=np.zeros(0, np.int64),
    targets=np.zeros(0, np.int64),
    temperature=np.zeros(0, np.float32),
)
"""A single position that no trained token is predicted from."""
EMPTY_MICRO_BATCH = MicroBatch(
    passes=(EMPTY_PASS,),
    behaviour_logprobs=np.zeros(0, np.float32),
    token_staleness=np.zeros(0, np.int64),
    advantages=np.zeros(0, np.float32),
    sequence_offsets=np.zeros(1, np.int64),
    samples=(),
)


@dataclass(frozen=True)
class MiniBatch:
    """A mini-batch, split into micro-batches for each rank."""

    shares: list[list[MicroBatch]]
    """Each rank's micro-batches."""
    num_sequences: int
    """All sequences of the mini-batch, also those that are not computed; a `sequence_mean` loss divides by it."""
    num_trained_tokens: int
    """All trained tokens likewise; a `token_mean` loss divides by it."""

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches of all ranks, in the order of ranks."""
        return [micro_batch for share in self.shares for micro_batch in share]

    def of_rank(self, rank: int) -> list[MicroBatch]:
        """The micro-batches that a rank computes: as many as every other rank, each with as many passes as theirs."""
        columns = zip_longest(*self.shares, fillvalue=EMPTY_MICRO_BATCH)
        return [_pad_passes(column[rank], max(len(one.passes) for one in column)) for column in columns]


def _pad_passes(micro_batch: MicroBatch, count: int) -> MicroBatch:
    missing = count - len(micro_batch.passes)
    return replace(micro_batch, passes=[*micro_batch.passes, *[EMPTY_PASS] * missing]) if missing else micro_batch


def split_among_ranks(
    samples: Sequence[Sample], max_tokens: int, num_ranks: int, *, is_all_computed: bool
) -> MiniBatch:
    """Micro-batches of at most `max_tokens`; ranks differ by at most the tokens of their longest sample.

    Each rank gets consecutive samples in the order of packing: a group is split only where two shares meet, and samples
    of similar length are in the same micro-batch. Unless `is_all_computed`, samples of advantage 0 (uniform groups) are
    left out, because they add exactly 0 to the gradient; if all have advantage 0, all are kept. Without samples there
    are no micro-batches: that mini-batch makes no update.
    """
    if not samples:
        return MiniBatch([[] for _ in range(num_ranks)], 0, 0)
    effective = [sample for sample in samples if is_all_computed or sample.advantage != 0]
    ordered = longest_groups_first(effective or samples)
    ends = np.cumsum([sample.num_tokens for sample in ordered])
    middles = ends - np.array([sample.num_tokens for sample in ordered]) / 2
    ranks = (middles * num_ranks / ends[-1]).astype(int)
    shares = [[s for s, owner in zip(ordered, ranks, strict=True) if owner == rank] for rank in range(num_ranks)]
    num_trained_tokens = sum(sample.rollout.num_trained_tokens for sample in samples)
    return MiniBatch([pack(share, max_tokens) for share in shares], len(samples), num_trained_tokens)


class StepOutcome(NamedTuple):
    """The results of a step: for each mini-batch, one entry per micro-batch."""

    losses: list[list[PolicyLoss]]
    proximal_logprobs: list[list[Tensor]]


class _EncodedLoss(msgspec.Struct, array_like=True):
    loss: float
    metrics: dict[str, float]
    num_tokens: int
    weight: int
    proximal_logprobs: bytes


_reports: msgspec.msgpack.Decoder[list[list[_EncodedLoss]]] = msgspec.msgpack.Decoder(list[list[_EncodedLoss]])


def encode_outcome(outcome: StepOutcome) -> bytes:
    """One rank's outcome as msgpack, to be sent to rank 0."""
    mini_batches = zip(outcome.losses, outcome.proximal_logprobs, strict=True)
    return msgspec.msgpack.encode(
        [
            [
                _EncodedLoss(
                    one.loss.item(),
                    one.metrics,
                    one.num_tokens,
                    one.weight,
                    logprobs.detach().cpu().float().numpy().tobytes(),
                )
                for one, logprobs in zip(losses, proximal, strict=True)
            ]
            for losses, proximal in mini_batches
        ]
    )


def merge_outcomes(reports: Sequence[bytes]) -> StepOutcome:
    """Decodes and merges all ranks' outcomes, in the order of `MiniBatch.micro_batches`."""
    decoded = [_reports.decode(content) for content in reports]
    mini_batches = [[one for part in parts for one in part] for parts in zip(*decoded, strict=True)]
    return StepOutcome(
        [
            [PolicyLoss(torch.tensor(one.loss), one.metrics, one.num_tokens, one.weight) for one in part]
            for part in mini_batches
        ],
        [[torch.frombuffer(bytearray(one.proximal_logprobs), dtype=torch.float32) for one in p] for p in mini_batches],
    )
