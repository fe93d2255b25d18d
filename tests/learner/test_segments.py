"""Episodes in a training step: a rollout is one sequence, and how it is cut into segments changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from headrace.common.wire import Group, check_group, decode_group, encode
from headrace.learner.model.packing import MicroBatch, Pass, pack
from headrace.learner.training.batch_samples import probe_samples, training_samples
from headrace.learner.training.rank_batches import split_among_ranks
from headrace.learner.training.trainer import Trainer
from tests.learner.test_trainer import STEPS, make_config, make_trainer
from tests.support.factories import make_group, make_rollout
from tests.support.segmented import LIMITS, as_episodes, reply_starts

REPLIES = [
    bytes(mask) for mask in ([1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1, 0, 0], [1, 1, 1], [1, 0, 1, 0, 1, 0, 1])
]
"""Loss masks."""
CUTS: dict[str, Callable[[list[int]], list[int]]] = {
    "everywhere": lambda places: places,
    "once": lambda places: places[-1:],
    "nowhere": lambda places: [],
}
"""Which of a rollout's later replies begin a segment."""
LOSSES: dict[str, dict[str, Any]] = {
    "default": {},
    "sequence_mean": {"loss_aggregation": "sequence_mean", "ratio_gradient": "token"},
    "token_level": {"importance_sampling_level": "token"},
    "baseline": {"ratio_gradient": "sequence", "behaviour_clip": False, "behav_imp_weight_mode": "sequence_truncate"},
    "against_behaviour_and_kl": {"ratio_gradient": "sequence", "use_decoupled_loss": False, "kl_coef": 0.1},
}


def make_conversations(trainer: Trainer) -> list[Group]:
    """Groups of two rollouts of several replies each; behaviour is the trainer's policy with noise. The two of the last
    group begin alike."""
    generator = np.random.default_rng(3)
    groups = []
    for index in range(4):
        rollouts = []
        for number, mask in enumerate((REPLIES[index], REPLIES[index - 1] if index < 3 else REPLIES[index])):
            tokens = generator.integers(5, 500, len(mask))
            tokens[: 3 * (index == 3)] = 7
            noise = generator.normal(-0.1, 0.1, mask.count(1)).astype(np.float32)
            rollouts.append(
                make_rollout(float(number), tuple(tokens.tolist()), loss_mask=mask, behaviour_logprobs=noise)
            )
        group = replace(make_group(f"0-{index}", (0.0, 1.0)), rollouts=rollouts)
        for sample in probe_samples(spanned(group), 0, STEPS):
            (segment,) = sample.rollout.segments
            with torch.no_grad():
                policy = trainer.policy.logprobs(*pack([sample], 1000)).numpy()
            segment.behaviour_logprobs[:] = np.minimum(segment.behaviour_logprobs + policy, 0)
        groups.append(spanned(group))
    return groups


def spanned(group: Group) -> Group:
    """With every sampled token of version 1."""
    for rollout in group.rollouts:
        (segment,) = rollout.segments
        segment.version_spans[:] = [msgspec.structs.replace(segment.version_spans[0], end=segment.num_trained_tokens)]
    return group


def cut(groups: list[Group], how: str) -> list[Group]:
    found = [as_episodes(group, [CUTS[how](reply_starts(one)) for one in group.rollouts]) for group in groups]
    for group in found:
        check_group(group)
    return found


def step_of(
    trainer: Trainer, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradients of the step's updates, which are not made, as one vector, and the step's row."""
    found: list[torch.Tensor] = []

    def capture(lr: float) -> float:
        found.append(torch.cat([m.grad.flatten() for m in trainer.optimizer.masters.values() if m.grad is not None]))
        for master in trainer.optimizer.masters.values():
            master.grad = None
        return 0.0

    monkeypatch.setattr(trainer.optimizer, "update", capture)
    row = trainer.train(groups, 0, STEPS)
    return torch.cat(found), row


@pytest.mark.parametrize("loss", LOSSES)
def test_a_rollout_cut_into_segments_has_the_loss_and_the_gradient_of_the_whole(
    demo_policy: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a budget of one or two segments, where a rollout takes several passes."""
    trainer = make_trainer(make_config(demo_policy, actor={"group_size": 2} | LOSSES[loss]))
    groups = make_conversations(trainer)
    expected, row = step_of(trainer, groups, monkeypatch)
    assert expected.norm() > 1e-3
    for how in CUTS:
        for budget in (4096, 20):
            learner = trainer.config.learner.model_copy(update={"micro_batch_tokens": budget})
            trainer.config = trainer.config.model_copy(update={"learner": learner})
            gradient, same = step_of(trainer, cut(groups, how), monkeypatch)
            assert (gradient - expected).norm() < 1e-5 * expected.norm(), (how, budget)
            for name in ("loss", "ess", "behaviour_weight_mean", "entropy", "batch_tokens", "completion_tokens_mean"):
                assert same[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), (name, how, budget)
    assert max(len(m.passes) for m, _ in trainer._latest) == 1, "the last was cut nowhere"


@pytest.mark.parametrize("loss", ["default", "sequence_mean"])
def test_any_order_of_packing_gives_the_same_gradient(
    demo_policy: Path, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of groups, of a group's rollouts, and in micro-batches and passes of any size."""
    actor = {"group_size": 2, "num_mini_batches": 1} | LOSSES[loss]
    trainer = make_trainer(make_config(demo_policy, actor=actor))
    groups = cut(make_conversations(trainer), "everywhere")
    expected, row = step_of(trainer, groups, monkeypatch)
    turned = [replace(group, rollouts=group.rollouts[::-1]) for group in groups[::-1]]
    for some, budget in ((turned, 4096), (turned, 33), (groups[2:] + groups[:2], 57)):
        learner = trainer.config.learner.model_copy(update={"micro_batch_tokens": budget})
        trainer.config = trainer.config.model_copy(update={"learner": learner})
        gradient, same = step_of(trainer, some, monkeypatch)
        assert (gradient - expected).norm() < 1e-5 * expected.norm(), budget
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-4, abs=1e-6)


def test_a_rollout_longer_than_the_budget_is_computed_in_passes(
    demo_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probabilities come first, without a gradient; then each pass is made again for its part of it."""
    actor = {"group_size": 2, "num_mini_batches": 1}
    trainer = make_trainer(make_config(demo_policy, actor=actor, learner={"micro_batch_tokens": 16}))
    groups = cut(make_conversations(trainer), "everywhere")
    held, score_pass = list[bool](), trainer.policy.score_pass

    def watched(one: Pass) -> Any:
        held.append(torch.is_grad_enabled())
        return score_pass(one)

    monkeypatch.setattr(trainer.policy, "score_pass", watched)
    step_of(trainer, groups, monkeypatch)
    counts = [len(m.passes) for m, _ in trainer._latest]
    expected = [is_graded for n in counts for is_graded in ([False] * n if n > 1 else []) + [True] * n]
    assert held == expected and max(counts) >= 3


def test_advantages_are_of_rollouts_however_many_segments_they_have(demo_policy: Path) -> None:
    config = make_config(demo_policy, actor={"group_size": 2, "batch_advantage_norm": True})
    groups = make_conversations(make_trainer(config))
    whole, segments = (training_samples(some, config, 0, STEPS) for some in (groups, cut(groups, "everywhere")))
    assert [one.advantage for one in whole] == [one.advantage for one in segments]
    assert [len(one.rollout.segments) for one in segments] == [3, 4, 3, 3, 1, 3, 4, 4]
    mini_batch = split_among_ranks(segments, 20, 3, is_all_computed=True)
    assert (mini_batch.num_sequences, mini_batch.num_trained_tokens) == (8, sum(g.num_trained_tokens for g in groups))
    owners = [id(sample.rollout) for m in mini_batch.micro_batches for sample in m.samples]
    assert len(owners) == len(set(owners)) == 8, "each rollout is whole, on one rank"


def test_a_page_sees_a_rollouts_tokens_in_order(demo_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_config(demo_policy, actor={"group_size": 2}))
    groups = make_conversations(trainer)
    found = []
    for some in (groups, cut(groups, "everywhere")):
        step_of(trainer, some, monkeypatch)
        found.append([one for group in some for one in trainer.trained_rollouts(group)])
    for whole, segments in zip(*found, strict=True):
        assert whole is not None and segments is not None and whole.advantage == segments.advantage
        np.testing.assert_allclose(whole.proximal_logprobs, segments.proximal_logprobs, atol=1e-5)


def test_a_micro_batch_has_no_loss_for_tokens_of_the_environment(demo_policy: Path) -> None:
    """No target, log-probability, staleness or advantage of theirs."""
    trainer = make_trainer(make_config(demo_policy, actor={"group_size": 2}))
    groups = cut(make_conversations(trainer), "once")
    for micro_batch in pack(training_samples(groups, trainer.config, 0, STEPS), 60):
        sampled = [
            token
            for sample in micro_batch.samples
            for segment in sample.rollout.segments
            for token, mask in zip(segment.tokens.tolist(), segment.loss_mask, strict=True)
            if mask
        ]
        assert [token for one in micro_batch.passes for token in one.targets.tolist()] == sampled
        assert micro_batch.behaviour_logprobs.shape == micro_batch.token_staleness.shape == (len(sampled),)
        assert micro_batch.advantages.shape == (len(micro_batch.samples),)


def test_the_last_messages_of_an_environment_change_neither_loss_nor_gradient(
    demo_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sampled behind them, so they are no context of anything either."""
    trainer = make_trainer(make_config(demo_policy, actor={"group_size": 2}))
    groups, found = make_conversations(trainer), []
    for is_changed in (False, True):
        if is_changed:
            for group in groups:
                for rollout in group.rollouts:
                    (segment,) = rollout.segments
                    end = segment.loss_mask.rfind(b"\1") + 1
                    segment.tokens[end:] = 499
        gradient, row = step_of(trainer, groups, monkeypatch)
        found.append((gradient, row["loss"]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_overlong_penalty_is_by_the_limit_of_the_episode(demo_policy: Path) -> None:
    actor = {"group_size": 2, "overlong_tokens": 4, "advantage_mean": "none", "advantage_std": "none"}
    config = make_config(demo_policy, actor=actor, sampling={"max_new_tokens": 4})
    group = make_group("0-0", (0.0, 0.0))
    episode = as_episodes(group, [[], []])

    def advantages(max_tokens: int) -> set[float]:
        limits = replace(LIMITS, max_tokens=max_tokens)
        some = replace(episode, ticket=replace(episode.ticket, limits=limits))
        return {one.advantage for one in training_samples([some], config, 0, STEPS)}

    of_one_completion = {one.advantage for one in training_samples([group], config, 0, STEPS)}
    assert (
        of_one_completion == {-0.75} and advantages(3) == {-1.0} and advantages(5) == {-0.5} and advantages(99) == {0.0}
    )


def test_groups_of_schema_2_make_the_same_samples(demo_policy: Path) -> None:
    config = make_config(demo_policy, actor={"group_size": 2})
    for group in make_conversations(make_trainer(config)):
        tree = msgspec.msgpack.decode(encode(group))
        old = {name: value for name, value in tree.items() if name != "prompts"} | {"schema": 2}
        names = ("tokens", "loss_mask", "behaviour_logprobs", "version_spans")
        old["rollouts"] = [
            {name: one["segments"][0][name] for name in names}
            | {name: one[name] for name in ("reward", "finish_reason", "text")}
            for one in tree["rollouts"]
        ]
        old["ticket"] = {k: v for k, v in tree["ticket"].items() if k not in ("tools", "limits")} | {"schema": 2}
        again = decode_group(msgspec.msgpack.encode(old))
        found, expected = (pack(training_samples([one], config, 0, STEPS), 60) for one in (again, group))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)


def assert_equal(one: MicroBatch, other: MicroBatch) -> None:
    for name in ("behaviour_logprobs", "token_staleness", "advantages", "sequence_offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for part, its in zip(one.passes, other.passes, strict=True):
        assert part.layout == its.layout
        for name in ("input_ids", "positions", "targets", "temperature"):
            np.testing.assert_array_equal(getattr(part, name), getattr(its, name))
