"""Poison is refused with a reason, and whatever passes is usable: by the learner's own pure parts, to the end."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from msgspec.structs import replace

from headrace.common.config import ActorConfig
from headrace.common.wire import Group, WireError, decode_group, encode
from headrace.learner.algorithm.advantage import group_advantages, normalise_over_tokens, overlong_penalty
from headrace.learner.algorithm.loss import policy_loss
from headrace.learner.algorithm.staleness import group_staleness
from headrace.learner.intake.held_out import Evaluation
from headrace.learner.intake.validation import GroupLimits, GroupRejected, validate_group
from headrace.learner.model.packing import MicroBatch, Sample, pack, split_mini_batches, token_staleness
from headrace.learner.training.step_metrics import group_metrics, logprob_gaps, off_policy_metrics, staleness_metrics
from tests.support.factories import make_group, make_rollout
from tests.support.mutations import LIMITS, groups, mutated_groups, poison_groups
from tests.support.poisons import Poison, poisons

STEP = 5
VERSION_STEPS = {1: 0, 4: 2, 7: 4}
"""The other versions at or below the highest are forgotten, or of a lost line of weights."""
thorough = settings(max_examples=200)


def take_in(payload: bytes, ticket_id: str, limits: GroupLimits = LIMITS) -> Group:
    """What the learner does with an entry of its stream."""
    group = decode_group(payload)
    validate_group(group, ticket_id, limits)
    return group


def use(group: Group) -> None:
    """Everything the learner computes from a group; all of it must be finite numbers."""
    actor = ActorConfig(advantage_std="none", overlong_tokens=4)
    lengths = torch.tensor([rollout.num_trained_tokens for rollout in group.rollouts])
    rewards = torch.tensor(group.rewards, dtype=torch.float64) + overlong_penalty(
        lengths, torch.full_like(lengths, 16), actor
    )
    advantages = group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.int64), actor)
    assert normalise_over_tokens(advantages, lengths).isfinite().all()
    samples = [
        Sample(group, rollout, advantage, token_staleness(rollout, STEP, VERSION_STEPS, None))
        for rollout, advantage in zip(group.rollouts, advantages.tolist(), strict=True)
    ]
    (mini_batch,) = split_mini_batches(samples, ActorConfig(num_mini_batches=1), "seed")
    micro_batches = pack(mini_batch, LIMITS.max_sequence_tokens)
    for micro_batch in micro_batches:
        for one in micro_batch.passes:
            assert (1 / one.temperature).max() < np.inf and one.input_ids.max() < LIMITS.vocab_size
    rows = [train(micro_batch) for micro_batch in micro_batches]
    evaluation = Evaluation(STEP, 1, {group.ticket.id})
    evaluation.collect(group, VERSION_STEPS)
    staleness = group_staleness(group, STEP, VERSION_STEPS)
    rows += [group_metrics([group]), evaluation.result(), staleness_metrics([staleness])]
    logprobs = [torch.zeros(m.num_trained_tokens) for m in micro_batches]
    rows += [off_policy_metrics(micro_batches, logprobs), logprob_gaps(micro_batches, logprobs)]
    json.dumps(rows, allow_nan=False)


def train(micro_batch: MicroBatch) -> dict[str, float]:
    """By a policy to which every token is certain: the largest importance weights that there can be."""
    policy = torch.zeros(micro_batch.num_trained_tokens, requires_grad=True)
    result = policy_loss(
        policy,
        policy.detach(),
        torch.from_numpy(micro_batch.behaviour_logprobs.copy()),
        torch.from_numpy(micro_batch.advantages),
        torch.ones_like(policy),
        ActorConfig(behaviour_clip=False),
        sequence_offsets=torch.from_numpy(micro_batch.sequence_offsets),
    )
    result.loss.backward()
    assert policy.grad is not None and policy.grad.isfinite().all()
    return {"loss": result.loss.item(), **result.metrics}


@settings(thorough, max_examples=100)
@given(groups())
def test_valid_groups_pass_and_are_usable(group: Group) -> None:
    again = take_in(encode(group), group.ticket.id)
    assert encode(again) == encode(group)
    use(again)


def test_mutated_groups_are_refused_or_usable() -> None:
    outcomes: Counter[str] = Counter()

    @thorough
    @given(mutated_groups())
    def check(payload: bytes) -> None:
        try:
            decoded = decode_group(payload)
            validate_group(decoded, decoded.ticket.id, LIMITS)
        except (WireError, GroupRejected) as error:
            outcomes[type(error).__name__] += 1
            assert str(error).isprintable() and 0 < len(str(error)) <= 300
        else:
            outcomes["usable"] += 1
            use(decoded)
            assert encode(decode_group(encode(decoded))) == encode(decoded)

    check()
    assert set(outcomes) == {"WireError", "GroupRejected", "usable"}, "the mutations reach all three"


@pytest.mark.parametrize("poison", poisons(make_group()), ids=lambda poison: poison.name)
def test_each_poison_is_refused_with_a_reason_that_names_it(poison: Poison) -> None:
    with pytest.raises((WireError, GroupRejected), match=poison.reason):
        take_in(poison.payload, poison.ticket_id)


@settings(thorough, max_examples=100)
@given(poison_groups())
def test_a_poison_is_one_whatever_group_it_was_made_from(poison: Poison) -> None:
    with pytest.raises((WireError, GroupRejected)) as refusal:
        take_in(poison.payload, poison.ticket_id)
    assert re.search(poison.reason, str(refusal.value)) and len(str(refusal.value)) <= 300


def test_limits_are_inclusive() -> None:
    """The last token of the vocabulary, the highest version and the longest sequence are still good."""
    rollout = make_rollout(tokens=(11,) * 4, version=3)
    group = replace(make_group(), rollouts=[rollout, rollout])
    limits = GroupLimits(vocab_size=12, group_size=2, num_eval_samples=1, max_sequence_tokens=7, highest_version=3)
    validate_group(group, "0-0", limits)
    for name, least in {"vocab_size": 11, "max_sequence_tokens": 6, "highest_version": 2, "group_size": 1}.items():
        with pytest.raises(GroupRejected):
            validate_group(group, "0-0", limits._replace(**{name: least}))


def test_groups_of_each_kind_have_the_size_of_their_kind() -> None:
    limits = LIMITS._replace(group_size=2, num_eval_samples=3)
    validate_group(make_group(kind="eval", rewards=(1.0, 0.0, 0.0)), "0-0", limits)
    with pytest.raises(GroupRejected, match="2 rollouts, expected 3 for eval"):
        validate_group(make_group(kind="eval"), "0-0", limits)
    with pytest.raises(GroupRejected, match="3 rollouts, expected 2 for train"):
        validate_group(make_group(rewards=(1.0, 0.0, 0.0)), "0-0", limits)
    with pytest.raises(GroupRejected, match="of kind 'test', expected train or eval"):
        validate_group(make_group(kind="test"), "0-0", limits)


def test_versions_that_nobody_remembers_are_legitimate() -> None:
    validate_group(make_group(version=7), "0-0", LIMITS)
