"""Completion tokens of a micro-batch in either layout, flattened: the sequence of each, and whether it counts.

Padded `(B, T)` and packed `(N,)` batches become the same thing here, so that nothing behind this module knows of two
layouts. What stands outside the mask, NaN included, becomes 0 and touches neither loss nor gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """`mask` and `sequence` are per token, `(N,)`; tokens of a sequence stand beside each other."""

    mask: Tensor
    sequence: Tensor
    num_sequences: int

    def sums(self, values: Tensor) -> Tensor:
        """Per-sequence sums `(B,)` of per-token `values` `(N,)`."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)

    def means(self, values: Tensor) -> Tensor:
        """Per-sequence means `(B,)` over loss tokens of `values` `(N,)`, which are 0 outside the mask."""
        return self.sums(values) / self.counts.clamp(min=1)

    @property
    def counts(self) -> Tensor:
        return self.sums(self.mask.to(torch.float32))


def flatten(logprobs: Tensor, loss_mask: Tensor, sequence_offsets: Tensor | None) -> Tokens:
    """Raises `ValueError` if the shapes contradict each other."""
    if loss_mask.shape != logprobs.shape:
        raise ValueError(f"loss_mask {tuple(loss_mask.shape)}, expected {tuple(logprobs.shape)}")
    mask = loss_mask.bool().reshape(-1)
    if sequence_offsets is None:
        if logprobs.dim() != 2:
            raise ValueError(f"log-probabilities {tuple(logprobs.shape)}: expected (B, T), or sequence_offsets")
        num_sequences, length = logprobs.shape
        lengths = torch.full((num_sequences,), length, device=logprobs.device)
    else:
        lengths = sequence_offsets.to(logprobs.device).diff()
        num_sequences = len(lengths)
        if logprobs.dim() != 1 or int(lengths.sum()) != len(logprobs) or bool((lengths < 0).any()):
            raise ValueError(f"sequence_offsets {sequence_offsets.tolist()} do not tile {tuple(logprobs.shape)} tokens")
    sequence = torch.arange(num_sequences, device=logprobs.device).repeat_interleave(lengths)
    return Tokens(mask, sequence, num_sequences)


def select(values: Tensor, tokens: Tokens) -> Tensor:
    """Flat, in float32 or better, 0 outside the mask."""
    if values.numel() != tokens.mask.numel():
        raise ValueError(f"{values.numel()} log-probabilities for {tokens.mask.numel()} tokens")
    flat = values.reshape(-1)
    return torch.where(tokens.mask, flat, 0.0).to(torch.promote_types(flat.dtype, torch.float32))
