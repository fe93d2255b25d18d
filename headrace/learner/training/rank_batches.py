"""A batch shared out among ranks by tokens, and what each rank reports of its share.

Pure functions of the batch: every rank computes all shares and takes its own, so that nothing has to be agreed on.
Ranks take as many forward and backward passes as the one with the most micro-batches, since those are collective: the
others compute on an empty one, which adds exactly 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from headrace.learner.algorithm.loss import PolicyLoss
from headrace.learner.model.packing import MicroBatch, Sample, longest_groups_first, pack
from headrace.learner.model.shared_prefix import Layout

NOTHING = MicroBatch(
    input_ids=np.zeros((1, 1), np.int64),
    layout=Layout([1], [[0]]),
    positions=np.zeros(0, np.int64),
    targets=np.zeros(0, np.int64),
    behaviour_logprobs=np.zeros(0, np.float32),
    temperature=np.zeros(0, np.float32),
    token_staleness=np.zeros(0, np.int64),
    advantages=np.zeros(0, np.float32),
    sequence_offsets=np.zeros(1, np.int64),
    rows=(),
)
"""One position, from which nothing is predicted."""


@dataclass(frozen=True)
class MiniBatch:
    """The micro-batches of every rank."""

    shares: list[list[MicroBatch]]
    num_sequences: int
    """What the loss is a mean over, computed or not."""
    num_trained_tokens: int
    """Likewise."""

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """Of all ranks, one rank after another."""
        return [micro_batch for share in self.shares for micro_batch in share]

    def of(self, rank: int) -> list[MicroBatch]:
        """What a rank computes: as many micro-batches as every other."""
        num_passes = max(len(share) for share in self.shares)
        return self.shares[rank] + [NOTHING] * (num_passes - len(self.shares[rank]))


def share_out(samples: Sequence[Sample], max_tokens: int, num_ranks: int, *, is_all_computed: bool) -> MiniBatch:
    """Micro-batches of at most `max_tokens`; ranks differ by at most the tokens of their longest sample.

    A rank's samples follow one another in the order of packing: groups stay together but where two shares meet, and
    what is as long is in the same micro-batch. Unless `is_all_computed`, samples of advantage 0 are left out as long as
    there are others: they add exactly 0 to the gradient, as those of uniform groups do. Of no samples there are no
    micro-batches: that mini-batch makes no update.
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


class Outcome(NamedTuple):
    """What became of a step's micro-batches."""

    losses: list[list[PolicyLoss]]
    """Of each mini-batch."""
    proximal_logprobs: list[list[Tensor]]


class _Loss(msgspec.Struct, array_like=True):
    loss: float
    metrics: dict[str, float]
    num_tokens: int
    weight: int
    proximal_logprobs: bytes


_reports: msgspec.msgpack.Decoder[list[list[_Loss]]] = msgspec.msgpack.Decoder(list[list[_Loss]])


def report(outcome: Outcome) -> bytes:
    """One rank's, as it travels to rank 0."""
    mini_batches = zip(outcome.losses, outcome.proximal_logprobs, strict=True)
    return msgspec.msgpack.encode(
        [
            [
                _Loss(
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


def combine_reports(reports: Sequence[bytes]) -> Outcome:
    """All ranks', in the order of `MiniBatch.micro_batches`."""
    decoded = [_reports.decode(content) for content in reports]
    mini_batches = [[one for part in parts for one in part] for parts in zip(*decoded, strict=True)]
    return Outcome(
        [
            [PolicyLoss(torch.tensor(one.loss), one.metrics, one.num_tokens, one.weight) for one in part]
            for part in mini_batches
        ],
        [[torch.frombuffer(bytearray(one.proximal_logprobs), dtype=torch.float32) for one in p] for p in mini_batches],
    )
