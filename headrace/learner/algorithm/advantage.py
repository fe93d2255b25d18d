"""Advantages from raw rewards: pure functions. Rewards are grouped by id, never by position.

Equations: docs/algorithm.md, section 1. Everything is computed in float64 and returned in the dtype of the input. A
group whose rewards are equal up to rounding (headrace/common/wire/uniform_rewards.py) gets advantages of exactly 0.
"""

import torch
from torch import Tensor

from headrace.common.config import ActorConfig
from headrace.common.wire.uniform_rewards import are_equal_rewards

EPSILON = 1e-5
"""Added to every standard deviation."""


def group_advantages(rewards: Tensor, group_ids: Tensor, settings: ActorConfig) -> Tensor:
    """Advantages `(B,)` from raw rewards `(B,)` and the group id of each, `(B,)` integers.

    r' = clip((r + reward_bias) * reward_scaling, ±reward_clip), A = (r' - mean) / (std + 1e-5), std unbiased. Exactly 0
    where all rewards that enter the std, or the group's mean, are equal.
    """
    if rewards.dim() != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)}: expected (B,) and (B,)"
        )
    rewards_exact = rewards.double()
    shaped = shape_rewards(rewards_exact, settings)
    _, groups = torch.unique(group_ids.to(rewards.device), return_inverse=True)
    advantages = shaped - _mean(shaped, groups, settings)
    if settings.advantage_std != "none":
        advantages = advantages / (_std(shaped, groups, settings) + EPSILON)
    if settings.advantage_mean in ("group", "leave_one_out") or settings.advantage_std == "group":
        advantages = torch.where(_is_uniform(rewards_exact, shaped, groups), 0.0, advantages)
    if settings.advantage_std == "batch":
        advantages = torch.where(_is_uniform(rewards_exact, shaped, torch.zeros_like(groups)), 0.0, advantages)
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def shape_rewards(rewards: Tensor, settings: ActorConfig) -> Tensor:
    shaped = (rewards + settings.reward_bias) * settings.reward_scaling
    return shaped.clamp(-settings.reward_clip, settings.reward_clip)


def normalise_over_tokens(advantages: Tensor, num_tokens: Tensor) -> Tensor:
    """Batch-level normalisation over loss tokens: `advantages` `(B,)`, each weighted by `num_tokens` `(B,)`.

    A <- (A - mu) / (sigma + 1e-5), mu and sigma token-weighted, sigma unbiased.
    """
    values, weights = advantages.double(), num_tokens.double()
    total = weights.sum()
    if total < 2:
        return torch.zeros_like(advantages)
    mean = (weights * values).sum() / total
    variance = (weights * (values - mean) ** 2).sum() / (total - 1)
    return ((values - mean) / (variance.sqrt() + EPSILON)).to(advantages.dtype)


def overlong_penalty(num_tokens: Tensor, max_tokens: Tensor, settings: ActorConfig) -> Tensor:
    """The penalty, at most 0, to add to the raw rewards of rollouts of `num_tokens` sampled tokens, `(B,)`; float64.

    `max_tokens` `(B,)`: how many each may have. DAPO (arXiv 2503.14476, eq. 13): linear from 0 at
    `max_tokens - overlong_tokens`.
    """
    if settings.overlong_tokens == 0:
        return torch.zeros_like(num_tokens, dtype=torch.float64)
    excess = num_tokens.double() - (max_tokens - settings.overlong_tokens)
    return (-excess / settings.overlong_tokens * settings.overlong_penalty_factor).clamp(max=0.0)


def _mean(values: Tensor, groups: Tensor, settings: ActorConfig) -> Tensor:
    kind = settings.advantage_mean
    if kind == "none":
        return torch.zeros_like(values)
    if kind == "batch":
        return values.mean().expand_as(values)
    sums, counts = _group_sums(values, groups), _group_sums(torch.ones_like(values), groups)
    if kind == "group":
        return (sums / counts)[groups]
    return (sums[groups] - values) / (counts[groups] - 1).clamp(min=1)


def _std(values: Tensor, groups: Tensor, settings: ActorConfig) -> Tensor:
    if settings.advantage_std == "batch":
        groups = torch.zeros_like(groups)
    counts = _group_sums(torch.ones_like(values), groups)
    means = _group_sums(values, groups) / counts
    squares = _group_sums((values - means[groups]) ** 2, groups)
    return (squares / (counts - 1).clamp(min=1)).sqrt()[groups]


def _is_uniform(rewards: Tensor, shaped: Tensor, groups: Tensor) -> Tensor:
    """For each reward, whether all rewards of its group are equal, before or after shaping."""
    lowest, highest = _group_bounds(rewards, groups)
    lowest_shaped, highest_shaped = _group_bounds(shaped, groups)
    is_uniform: Tensor = are_equal_rewards(lowest, highest) | (lowest_shaped == highest_shaped)
    return is_uniform[groups]


def _group_bounds(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    empty = values.new_zeros(int(groups.max()) + 1 if groups.numel() else 0)
    lowest = empty.scatter_reduce(0, groups, values, "amin", include_self=False)
    return lowest, empty.scatter_reduce(0, groups, values, "amax", include_self=False)


def _group_sums(values: Tensor, groups: Tensor) -> Tensor:
    num_groups = int(groups.max()) + 1 if groups.numel() else 0
    return values.new_zeros(num_groups).index_add(0, groups, values)
