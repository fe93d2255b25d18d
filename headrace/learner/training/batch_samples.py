"""From a batch of groups to the samples that a step trains on: rollouts with advantages and token staleness. Pure."""

from collections.abc import Mapping, Sequence

import torch

from headrace.common.config import RunConfig
from headrace.common.wire import Group
from headrace.learner.algorithm.advantage import group_advantages, normalise_over_tokens, overlong_penalty
from headrace.learner.model.packing import Sample, current_version, token_staleness


def training_samples(
    groups: Sequence[Group], config: RunConfig, step: int, version_steps: Mapping[int, int]
) -> list[Sample]:
    """The rollouts that `actor.truncated` leaves to be trained; advantages are computed among these only."""
    actor = config.actor
    rollouts = [
        (index, group, one) for index, group in enumerate(groups) for one in group.trainable_rollouts(actor.truncated)
    ]
    lengths = torch.tensor([rollout.num_trained_tokens for _, _, rollout in rollouts])
    rewards = torch.tensor([rollout.reward for _, _, rollout in rollouts], dtype=torch.float64)
    rewards += overlong_penalty(lengths, torch.tensor([_max_tokens(group, config) for _, group, _ in rollouts]), actor)
    advantages = group_advantages(rewards, torch.tensor([index for index, _, _ in rollouts]), actor)
    if actor.batch_advantage_norm:
        advantages = normalise_over_tokens(advantages, lengths)
    current = current_version(step, version_steps)
    return [
        Sample(group, rollout, advantage, token_staleness(rollout, step, version_steps, current))
        for (_, group, rollout), advantage in zip(rollouts, advantages.tolist(), strict=True)
    ]


def probe_samples(group: Group, step: int, version_steps: Mapping[int, int]) -> list[Sample]:
    """All rollouts of a group that is scored and not trained; their advantages are 0."""
    current = current_version(step, version_steps)
    return [
        Sample(group, rollout, 0.0, token_staleness(rollout, step, version_steps, current))
        for rollout in group.rollouts
    ]


def _max_tokens(group: Group, config: RunConfig) -> int:
    """The largest number of tokens that may be sampled for a rollout of the group."""
    return group.ticket.limits.max_tokens if group.ticket.limits else config.sampling.max_new_tokens
