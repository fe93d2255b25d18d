"""Log-probabilities of given tokens from hidden states, without `(tokens, vocabulary)` logits of a whole batch.

Logits exist for one chunk of tokens at a time, and are computed again in the backward pass: memory is
`chunk_tokens * vocabulary` floats, whatever the batch. The maths is float32, whatever the model's dtype.
"""

from typing import Any

import torch
from torch import Tensor


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, chunk_tokens: int) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[target], `(N,)` float32 (float64 for float64 inputs).

    `hidden` `(N, H)`, `weight` `(V, H)`, `targets` `(N,)` int64, `temperature` `(N,)`: each token's own.
    """
    result: Tensor = _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk_tokens)  # type: ignore[no-untyped-call]
    return result


def _chunk_logits(hidden: Tensor, weight: Tensor, temperature: Tensor) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.div_(temperature[:, None].to(logits.dtype))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, chunk_tokens: int
    ) -> Tensor:
        parts = []
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = _chunk_logits(hidden[chunk], weight, temperature[chunk])
            chosen = logits.gather(1, targets[chunk, None]).squeeze(1)
            parts.append(chosen - logits.logsumexp(dim=1))
        ctx.save_for_backward(hidden, weight, targets, temperature)
        ctx.chunk_tokens = chunk_tokens
        return (
            torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden, weight, targets, temperature = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for start in range(0, len(hidden), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            # d logp / d logits = onehot(target) - softmax, d logits / d raw = 1 / temperature
            grad_logits = _chunk_logits(hidden[chunk], weight, temperature[chunk]).softmax(dim=1).neg_()
            grad_logits.scatter_add_(1, targets[chunk, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits.mul_((grad[chunk] / temperature[chunk]).to(grad_logits.dtype)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[chunk] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[chunk]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None
