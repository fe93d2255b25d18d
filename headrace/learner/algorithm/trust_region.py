"""Trust regions: bounds on importance ratios, behaviour weights and a sequence's drift from the behaviour policy.

Pure functions on flat tensors `(N,)` (`token_layout.py`), each from one paper; `loss.py` combines them. Equations:
docs/algorithm.md, sections 3, 3b and 3c. Each function treats every sequence separately, so that micro-batches add up
exactly.
"""

import torch
from torch import Tensor

from headrace.common.config import ActorConfig
from headrace.learner.algorithm.token_layout import Tokens

SOFT_TAU_POSITIVE, SOFT_TAU_NEGATIVE = 1.0, 1.05
"""SAPO's temperatures for positive and negative advantages (arXiv 2511.20347, section 5)."""
MAX_SECOND_MOMENT = 0.04
"""M2PO's bound on the mean squared log-ratio, in nats² (arXiv 2510.01161)."""
MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ±20 and have no gradient beyond. e^20 is 4.9e8; its square times a batch's size is well
within float32, so a single diverged sequence cannot make a mini-batch's gradient infinite, which would skip the
update, nor dominate it."""
BAND_FLOOR = 0.5
"""IcePop's lower bound of behaviour weights; the upper one is the cap (0.5 and 5: Ring-1T, arXiv 2510.18855)."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of the argument clamped to ±`MAX_LOG_RATIO`; within the bounds value and gradient are exact."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def is_within_clamp(log_ratio: Tensor) -> Tensor:
    """True where `bounded_exp` has a gradient."""
    return log_ratio.abs() <= MAX_LOG_RATIO


def surrogate_loss(
    ratio: Tensor, advantage: Tensor, tokens: Tokens, settings: ActorConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The per-token loss, and masks of where the trust region and the dual clip took effect; `(N,)` each."""
    if settings.trust_region == "soft":
        nowhere = torch.zeros_like(tokens.mask)
        return -advantage * soft_gate(ratio, advantage), nowhere, nowhere
    if settings.trust_region == "second_moment":
        kept = second_moment_mask(ratio.detach().log(), advantage, tokens)
        return -advantage * ratio * kept, ~kept, torch.zeros_like(kept)
    return _clipped(ratio, advantage, settings)


def _clipped(ratio: Tensor, advantage: Tensor, settings: ActorConfig) -> tuple[Tensor, Tensor, Tensor]:
    lowest, highest = settings.clip_range
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(lowest, highest)
    loss = torch.maximum(free, bounded)
    clipped = free < bounded
    if settings.dual_clip is None:
        return loss, clipped, torch.zeros_like(clipped)
    ceiling = settings.dual_clip * advantage.abs()
    return torch.minimum(loss, ceiling), clipped, (loss > ceiling) & (advantage < 0)


def soft_gate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """f(ρ) = 4/τ · σ(τ(ρ − 1)), SAPO (arXiv 2511.20347, eq. 6): slope 1 at ρ = 1, falling smoothly on both sides."""
    tau = torch.full_like(ratio, SOFT_TAU_NEGATIVE).masked_fill(advantage > 0, SOFT_TAU_POSITIVE)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1))


def second_moment_mask(log_ratio: Tensor, advantage: Tensor, tokens: Tokens) -> Tensor:
    """False where M2PO (arXiv 2510.01161, algorithm 1) masks a token; per sequence, where the paper uses the batch.

    Among the tokens whose ratio has already moved in the direction of their advantage, those with the largest squared
    log-ratios are masked until the mean of the others is at most `MAX_SECOND_MOMENT`. All other tokens are kept.
    """
    is_outward = tokens.mask & (advantage * log_ratio > 0)
    moment = torch.where(is_outward, log_ratio.double() ** 2, 0.0)
    by_moment = moment.argsort(stable=True)
    order = by_moment[tokens.sequence_index[by_moment].argsort(stable=True)]

    def running_sums(values: Tensor) -> Tensor:
        """For each token in `order`, the sum over its sequence's tokens up to it."""
        sums = tokens.sequence_sums(values)
        return values[order].cumsum(0) - (sums.cumsum(0) - sums)[tokens.sequence_index[order]]

    means = running_sums(moment) / running_sums(is_outward.double()).clamp(min=1)
    is_kept = torch.empty_like(is_outward)
    is_kept[order] = means <= MAX_SECOND_MOMENT
    return is_kept | ~is_outward


def behaviour_weight(log_weight: Tensor, tokens: Tokens, settings: ActorConfig) -> tuple[Tensor, Tensor]:
    """The per-token weight from log(proximal/behaviour), and a mask of where it was out of bounds; `(N,)` each."""
    mode, cap = settings.behav_imp_weight_mode, settings.behav_imp_weight_cap
    if mode == "disabled" or not settings.use_decoupled_loss:
        return torch.ones_like(log_weight), torch.zeros_like(tokens.mask)
    if mode.startswith("sequence"):
        log_weight = tokens.sequence_means(log_weight)[tokens.sequence_index]
    weight = bounded_exp(log_weight)
    is_outside = weight > cap
    if mode == "token_band":
        is_outside |= weight < BAND_FLOOR
    replacement = cap if mode.endswith("truncate") else 0.0
    return torch.where(is_outside, replacement, weight), is_outside


def behaviour_clip_mask(log_weight: Tensor, advantage: Tensor, tokens: Tokens, settings: ActorConfig) -> Tensor:
    """False on all tokens of a sequence whose drift from the behaviour policy left the clip range in the direction of
    its advantage.

    The lower bound alone is off-policy sequence masking (OPSM; DeepSeek-V3.2, arXiv 2512.02556) with
    δ = −log(1 − eps_clip), measured at the start of the step.
    """
    if not settings.behaviour_clip:
        return torch.ones_like(tokens.mask)
    lowest, highest = settings.clip_range
    drift = bounded_exp(tokens.sequence_means(log_weight))
    sign = tokens.sequence_means(advantage)
    dropped = ((drift > highest) & (sign > 0)) | ((drift < lowest) & (sign < 0))
    return ~dropped[tokens.sequence_index]
