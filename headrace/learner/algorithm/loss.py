"""Decoupled GSPO and its variants: one pure function from log-probabilities to a scalar loss.

Three policies (docs/algorithm.md): *behaviour* sampled the tokens, *proximal* is the learner's policy at the start of
the step, *policy* is being optimised. Sections 2, 3 and 3b of that document give the equations; GSPO is
arXiv 2507.18071, the decoupled objective arXiv 2110.00641. `trust_region.py` bounds ratios and weights. Padded and
packed layouts give the same numbers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.common.config import ActorConfig
from headrace.learner.algorithm.token_layout import Tokens, flatten, select
from headrace.learner.algorithm.trust_region import (
    behaviour_clip_mask,
    behaviour_weight,
    bounded_exp,
    is_within_clamp,
    surrogate_loss,
)


@dataclass(frozen=True)
class PolicyLoss:
    loss: Tensor
    """Scalar; 0 with a zero gradient if no token is trained."""
    metrics: dict[str, float]
    """Means over loss tokens; names that end in `_max` are maxima."""
    num_tokens: int
    """Number of loss tokens, which the metrics are means over."""
    weight: int
    """The number of elements that the loss is a mean over: loss tokens, or sequences with loss tokens. Losses of
    micro-batches are combined with these weights."""


def policy_loss(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    settings: ActorConfig,
    *,
    sequence_offsets: Tensor | None = None,
) -> PolicyLoss:
    """The loss of one micro-batch.

    All tensors are padded `(B, T)`, or packed `(N,)` with `sequence_offsets` `(B+1,)` (first 0, last N).
    `advantages` may also be one per sequence, `(B,)`. Gradients flow into `policy_logprobs` only.
    Raises `ValueError` if the shapes contradict each other.
    """
    tokens = flatten(policy_logprobs, loss_mask, sequence_offsets)
    policy = select(policy_logprobs, tokens)
    behaviour = select(behaviour_logprobs, tokens).detach()
    proximal = select(proximal_logprobs, tokens).detach() if settings.use_decoupled_loss else behaviour
    advantage = _token_advantages(advantages, policy_logprobs, tokens, settings)

    ratio = _importance_ratio(policy, proximal, tokens, settings)
    per_token, clipped, dual_clipped = surrogate_loss(ratio, advantage, tokens, settings)
    log_weight = proximal - behaviour
    weight, over_cap = behaviour_weight(log_weight, tokens, settings)
    kept = behaviour_clip_mask(log_weight, advantage, tokens, settings)
    loss, aggregated_over = _aggregate(per_token * weight * kept, tokens, settings)
    uncapped_weight = bounded_exp(log_weight)
    metrics = _metrics(
        tokens.mask,
        means={
            "importance_ratio_mean": ratio,
            "clip_fraction": clipped,
            "dual_clip_fraction": dual_clipped,
            "behaviour_weight_mean": uncapped_weight,
            "behaviour_weight_capped_mean": weight,
            "behaviour_mask_fraction": over_cap,
            "behaviour_clip_fraction": ~kept,
        },
        maxima={"importance_ratio_max": ratio, "behaviour_weight_max": uncapped_weight},
    )
    return PolicyLoss(loss, metrics, num_tokens=int(tokens.mask.sum()), weight=aggregated_over)


def reference_kl(policy_logprobs: Tensor, reference_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference), of the inputs' shape; d is clamped to ±10.

    k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d with d = log policy - log reference (joschu.net/blog/kl-approx.html).
    """
    difference = (policy_logprobs - reference_logprobs.detach()).clamp(-10.0, 10.0)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    return torch.exp(-difference) - 1 + difference


def _token_advantages(advantages: Tensor, logprobs: Tensor, tokens: Tokens, settings: ActorConfig) -> Tensor:
    if advantages.shape != logprobs.shape and advantages.shape == (tokens.num_sequences,):
        advantages = advantages[tokens.sequence_index]
    flat = select(advantages, tokens).detach()
    if settings.importance_sampling_level == "sequence":
        flat = tokens.sequence_means(flat)[tokens.sequence_index]
    return flat


def _importance_ratio(policy: Tensor, proximal: Tensor, tokens: Tokens, settings: ActorConfig) -> Tensor:
    log_ratio = policy - proximal
    if settings.importance_sampling_level == "token":
        return bounded_exp(log_ratio)
    sequence_log_ratio = tokens.sequence_means(log_ratio)[tokens.sequence_index]
    if settings.ratio_gradient == "sequence":
        return bounded_exp(sequence_log_ratio)
    moves = is_within_clamp(sequence_log_ratio.detach())
    return bounded_exp(sequence_log_ratio.detach()) * torch.exp((policy - policy.detach()) * moves)


def _aggregate(per_token: Tensor, tokens: Tokens, settings: ActorConfig) -> tuple[Tensor, int]:
    per_token = torch.where(tokens.mask, per_token, 0.0)
    if settings.loss_aggregation == "token_mean":
        weight = int(tokens.mask.sum())
        return per_token.sum() / max(1, weight), weight
    weight = int((tokens.sequence_counts > 0).sum())
    return tokens.sequence_means(per_token).sum() / max(1, weight), weight


@torch.no_grad()
def _metrics(mask: Tensor, means: dict[str, Tensor], maxima: dict[str, Tensor]) -> dict[str, float]:
    """All metrics, with a single transfer from the device."""
    if not bool(mask.any()):
        return dict.fromkeys([*means, *maxima], 0.0)
    values = [value.detach()[mask].to(torch.float64).mean() for value in means.values()]
    values += [value.detach()[mask].to(torch.float64).max() for value in maxima.values()]
    return dict(zip([*means, *maxima], torch.stack(values).tolist(), strict=True))
