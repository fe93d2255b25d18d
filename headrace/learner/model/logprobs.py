"""Log-probabilities of given tokens from hidden states, without `(tokens, vocabulary)` logits of a whole batch.

Logits exist for one chunk of tokens at a time, and are recomputed in the backward pass. They and everything computed
from them are float32, whatever the model's dtype: rounding logits of 16 to 32 to bfloat16 would give errors of 0.06,
which would be most of the gap between engine and learner (NVIDIA-NeMo/RL#3936). Peak bytes, with C tokens in a chunk,
vocabulary V and hidden size H: forward `4.5 CV`; backward `4 CV + 4 VH` in float32, `6 CV + 8 VH` for bfloat16 on CUDA.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

NUM_PARTS = 8
"""Number of parts that a chunk is processed in where exponentials are needed beside the logits."""
VOCABULARY_BLOCK = 16384
"""Number of rows of a bfloat16 head that a CPU converts to float32 at a time."""


class TokenScores(NamedTuple):
    """Both `(N,)` float32 (float64 for float64 inputs)."""

    logprobs: Tensor
    entropy: Tensor
    """The entropy of the distribution that each token is from, in nats; without a gradient."""


def score_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, chunk_tokens: int
) -> TokenScores:
    """log softmax(hidden @ weight.T / temperature)[target], and the entropy of that softmax.

    `hidden` `(N, H)`, `weight` `(V, H)`, `targets` `(N,)` int64, `temperature` `(N,)`, one per token.
    """
    return TokenScores(*_TokenLogprobs.apply(hidden, weight, targets, temperature, chunk_tokens))  # type: ignore[no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, top, total = (
            hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32)) for _ in range(4)
        )
        for chunk in _slices(len(hidden), chunk_tokens):
            logits = _logits(hidden[chunk], weight, temperature[chunk])
            logprobs[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1)
            top[chunk], total[chunk], entropy[chunk] = _softmax_statistics(logits)
        logprobs.sub_(top).sub_(total.log())
        ctx.save_for_backward(hidden, weight, targets, temperature, top, total)
        ctx.chunk_tokens = chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad, _ = grad_outputs
        hidden, weight, targets, temperature, top, total = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for chunk in _slices(len(hidden), ctx.chunk_tokens):
            # d logp / d logits = onehot(target) - softmax, d logits / d raw = 1 / temperature
            logits = _logits(hidden[chunk], weight, temperature[chunk])
            grad_logits = logits.sub_(top[chunk, None]).exp_().div_(total[chunk, None]).neg_()
            grad_logits.scatter_add_(1, targets[chunk, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits.mul_((grad[chunk] / temperature[chunk]).to(grad_logits.dtype)[:, None])
            grad_hidden[chunk] = _add_gradients(grad_logits, hidden[chunk], weight, grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: Tensor) -> Tensor:
    """Logits `(C, V)` in float32 or float64. A plain bfloat16 matrix product would round them to bfloat16."""
    if hidden.dtype != torch.bfloat16:
        logits = hidden @ weight.T
    elif hidden.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        wide = hidden.float()
        logits = wide.new_empty(len(hidden), len(weight))
        for block in _slices(len(weight), VOCABULARY_BLOCK):
            logits[:, block] = wide @ weight[block].float().T
    return logits.div_(temperature.unsqueeze(1).to(logits.dtype))


def _softmax_statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row its largest logit, Σ exp(logits - largest) and the softmax's entropy, `(C,)` each; overwrites
    `logits`. Largest and sum are returned separately, because the rounding of their log would be in every
    probability."""
    found = []
    for rows in logits.split(max(1, -(-len(logits) // NUM_PARTS))):
        top = rows.amax(dim=1, keepdim=True)
        exponentials = rows.sub_(top).exp()
        total = exponentials.sum(dim=1)
        mean = exponentials.mul_(rows).sum(dim=1) / total
        found.append((top.squeeze(1), total, total.log() - mean))
    tops, totals, entropies = zip(*found, strict=True)
    return torch.cat(tops), torch.cat(totals), torch.cat(entropies)


def _add_gradients(grad_logits: Tensor, hidden: Tensor, weight: Tensor, grad_weight: Tensor) -> Tensor:
    """Returns the gradient of `hidden`, in its dtype, and adds the gradient of `weight` to `grad_weight`."""
    if hidden.dtype != torch.bfloat16:
        grad_weight.addmm_(grad_logits.T, hidden)
        return grad_logits @ weight
    if hidden.is_cuda:
        rounded = grad_logits.bfloat16()
        grad_weight += torch.mm(rounded.T, hidden, out_dtype=torch.float32)
        return rounded @ weight
    wide = hidden.float()
    grad_hidden = torch.zeros_like(wide)
    for block in _slices(len(weight), VOCABULARY_BLOCK):
        grad_weight[block].addmm_(grad_logits[:, block].T, wide)
        grad_hidden.addmm_(grad_logits[:, block], weight[block].float())
    return grad_hidden.bfloat16()


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))
