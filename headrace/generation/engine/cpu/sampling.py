"""Sampling for SGLang on a CPU with one random number per sequence.

SGLang draws one for every token of the vocabulary; the distribution is the same. Installed by SGLang's plugin hooks;
imported in SGLang's processes only.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sample(
    original: Callable[..., Tensor],
    probs: Tensor,
    sampling_seed: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Samples `(B,)` int32 tokens from `probs` `(B, vocabulary)`, by the inverse of the cumulative distribution in
    float64. Batches with seeds go to the original."""
    if sampling_seed is not None:
        return original(probs, sampling_seed, positions)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    drawn = torch.rand(len(probs), 1, dtype=torch.float64) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, drawn, right=True)  # the first above it: never a token of probability 0
    return tokens.clamp_(max=probs.shape[1] - 1).view(-1).to(torch.int32)


HOOKS = {"sglang.srt.layers.sampler.sampling_from_probs_torch": sample}
