"""Decoupled GSPO and its variants: one pure function from log-probabilities to a scalar loss.

Three policies (docs/algorithm.md): *behaviour* sampled the tokens, *proximal* is the learner at the start of the
step, *policy* is being optimised. Sections 2, 3 and 3b of that document give the equations; GSPO is
arXiv 2507.18071, the decoupled objective arXiv 2110.00641. Padded and packed layouts give the same numbers,
and tokens outside the mask, whatever they hold (NaN included), touch neither loss nor gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config import ActorConfig


@dataclass(frozen=True)
class PolicyLoss:
    loss: Tensor
    """Scalar; 0 with a zero gradient where no token is trained."""
    metrics: dict[str, float]
    """Means over loss tokens; names that end in `_max` are maxima."""
    num_tokens: int
    """Loss tokens: what the metrics are means over."""
    weight: int
    """What the loss is a mean over: loss tokens, or sequences that have any. Micro-batches add up by it."""


@dataclass(frozen=True)
class _Tokens:
    """A batch of either layout, flattened: per-token tensors `(N,)`, and the sequence of each token."""

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
    tokens = _flatten(policy_logprobs, loss_mask, sequence_offsets)
    policy = _select(policy_logprobs, tokens)
    behaviour = _select(behaviour_logprobs, tokens).detach()
    proximal = _select(proximal_logprobs, tokens).detach() if settings.use_decoupled_loss else behaviour
    advantage = _token_advantages(advantages, policy_logprobs, tokens, settings)

    ratio = _importance_ratio(policy, proximal, tokens, settings)
    per_token, clipped, dual_clipped = _clipped_objective(ratio, advantage, settings)
    log_weight = proximal - behaviour
    weight, over_cap = _behaviour_weight(log_weight, tokens, settings)
    kept = _inside_behaviour_clip(log_weight, advantage, tokens, settings)
    loss, aggregated_over = _aggregate(per_token * weight * kept, tokens, settings)
    metrics = _metrics(
        tokens.mask,
        means={
            "importance_ratio_mean": ratio,
            "clip_fraction": clipped,
            "dual_clip_fraction": dual_clipped,
            "behaviour_weight_mean": log_weight.exp(),
            "behaviour_weight_capped_mean": weight,
            "behaviour_mask_fraction": over_cap,
            "behaviour_clip_fraction": ~kept,
        },
        maxima={"importance_ratio_max": ratio, "behaviour_weight_max": log_weight.exp()},
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


def _flatten(logprobs: Tensor, loss_mask: Tensor, sequence_offsets: Tensor | None) -> _Tokens:
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
    return _Tokens(mask, sequence, num_sequences)


def _select(values: Tensor, tokens: _Tokens) -> Tensor:
    """Flat, in float32 or better, 0 outside the mask."""
    if values.numel() != tokens.mask.numel():
        raise ValueError(f"{values.numel()} log-probabilities for {tokens.mask.numel()} tokens")
    flat = values.reshape(-1)
    return torch.where(tokens.mask, flat, 0.0).to(torch.promote_types(flat.dtype, torch.float32))


def _token_advantages(advantages: Tensor, logprobs: Tensor, tokens: _Tokens, settings: ActorConfig) -> Tensor:
    if advantages.shape != logprobs.shape and advantages.shape == (tokens.num_sequences,):
        advantages = advantages[tokens.sequence]
    flat = _select(advantages, tokens).detach()
    if settings.importance_sampling_level == "sequence":
        flat = tokens.means(flat)[tokens.sequence]
    return flat


def _importance_ratio(policy: Tensor, proximal: Tensor, tokens: _Tokens, settings: ActorConfig) -> Tensor:
    log_ratio = policy - proximal
    if settings.importance_sampling_level == "token":
        return log_ratio.exp()
    sequence_ratio = tokens.means(log_ratio).exp()[tokens.sequence]
    if settings.ratio_gradient == "sequence":
        return sequence_ratio
    return sequence_ratio.detach() * torch.exp(policy - policy.detach())


def _clipped_objective(ratio: Tensor, advantage: Tensor, settings: ActorConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token loss, where the clip acted, where the dual clip acted."""
    lowest, highest = settings.clip_range
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(lowest, highest)
    loss = torch.maximum(free, bounded)
    clipped = free < bounded
    if settings.c_clip is None:
        return loss, clipped, torch.zeros_like(clipped)
    ceiling = settings.c_clip * advantage.abs()
    return torch.minimum(loss, ceiling), clipped, (loss > ceiling) & (advantage < 0)


def _behaviour_weight(log_weight: Tensor, tokens: _Tokens, settings: ActorConfig) -> tuple[Tensor, Tensor]:
    """Per-token weight after the cap, and where it was above the cap."""
    mode, cap = settings.behav_imp_weight_mode, settings.behav_imp_weight_cap
    if mode == "disabled" or not settings.use_decoupled_loss:
        return torch.ones_like(log_weight), torch.zeros_like(tokens.mask)
    if mode.startswith("sequence"):
        log_weight = tokens.means(log_weight)[tokens.sequence]
    weight = log_weight.exp()
    over_cap = weight > cap
    replacement = 0.0 if mode.endswith("mask") else cap
    return torch.where(over_cap, replacement, weight), over_cap


def _inside_behaviour_clip(log_weight: Tensor, advantage: Tensor, tokens: _Tokens, settings: ActorConfig) -> Tensor:
    """False on every token of a sequence that has drifted from behaviour, with its advantage, out of the range."""
    if not settings.behaviour_clip:
        return torch.ones_like(tokens.mask)
    lowest, highest = settings.clip_range
    drift = tokens.means(log_weight).exp()
    sign = tokens.means(advantage)
    dropped = ((drift > highest) & (sign > 0)) | ((drift < lowest) & (sign < 0))
    return ~dropped[tokens.sequence]


def _aggregate(per_token: Tensor, tokens: _Tokens, settings: ActorConfig) -> tuple[Tensor, int]:
    per_token = torch.where(tokens.mask, per_token, 0.0)
    if settings.loss_aggregation == "token_mean":
        weight = int(tokens.mask.sum())
        return per_token.sum() / max(1, weight), weight
    weight = int((tokens.counts > 0).sum())
    return tokens.means(per_token).sum() / max(1, weight), weight


@torch.no_grad()
def _metrics(mask: Tensor, means: dict[str, Tensor], maxima: dict[str, Tensor]) -> dict[str, float]:
    """One transfer from the device for all of them."""
    if not bool(mask.any()):
        return dict.fromkeys([*means, *maxima], 0.0)
    values = [value.detach()[mask].to(torch.float64).mean() for value in means.values()]
    values += [value.detach()[mask].to(torch.float64).max() for value in maxima.values()]
    return dict(zip([*means, *maxima], torch.stack(values).tolist(), strict=True))
