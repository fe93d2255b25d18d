"""Completion tokens of a micro-batch in either layout, flattened: each token's sequence and whether it is in the loss.

Padded `(B, T)` and packed `(N,)` batches get the same form here, so that other modules need to know only one. Values
outside the mask, NaN included, become 0 and affect neither loss nor gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """`mask` (bool) and `sequence_index` (int64) are per token, `(N,)`; a sequence's tokens are contiguous."""

    mask: Tensor
    sequence_index: Tensor
    num_sequences: int

    def sequence_sums(self, values: Tensor) -> Tensor:
        """Per-sequence sums `(B,)` of per-token `values` `(N,)`."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence_index, values)

    def sequence_means(self, values: Tensor) -> Tensor:
        """Per-sequence means `(B,)` over loss tokens of `values` `(N,)`, which are 0 outside the mask."""
        return self.sequence_sums(values) / self.sequence_counts.clamp(min=1)

    @property
    def sequence_counts(self) -> Tensor:
        """Number of loss tokens of each sequence, `(B,)` float32."""
        return self.sequence_sums(self.mask.to(torch.float32))


def flatten(logprobs: Tensor, loss_mask: Tensor, sequence_offsets: Tensor | None) -> Tokens:
    """The tokens of padded `(B, T)` or, with `sequence_offsets` `(B+1,)`, packed `(N,)` log-probabilities. Raises
    `ValueError` if the shapes contradict each other."""
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
    """`values` flattened to `(N,)`, in float32 or float64, 0 outside the mask."""
    if values.numel() != tokens.mask.numel():
        raise ValueError(f"{values.numel()} log-probabilities for {tokens.mask.numel()} tokens")
    flat = values.reshape(-1)
    return torch.where(tokens.mask, flat, 0.0).to(torch.promote_types(flat.dtype, torch.float32))
