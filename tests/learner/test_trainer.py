"""A step on the demo's policy: splits do not change it, proximal is policy until the first update, reward goes up."""

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from headrace.common.config import RunConfig
from headrace.common.wire import Group, Rollout, VersionSpan
from headrace.learner.model.logprobs import TokenScores
from headrace.learner.model.packing import MicroBatch, Sample, pack
from headrace.learner.model.policy import Policy
from headrace.learner.training.rank_batches import split_among_ranks
from headrace.learner.training.trainer import Trainer
from tests.support.factories import make_group, make_rollout

STEPS = {1: 0, 2: 1}


def make_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    chosen: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "float32"},
        "task": {"name": "arithmetic"},
        "sampling": {"max_new_tokens": 16},
        "optimizer": {"lr": 1e-3},
        "learner": {"device": "cpu", "gradient_checkpointing": False, "groups_per_step": 4, "num_threads": 1},
    }
    for name, section in sections.items():
        chosen[name] = chosen.get(name, {}) | section
    return RunConfig.model_validate(chosen)


def make_trainer(config: RunConfig) -> Trainer:
    return Trainer(config, Policy(config.model, config.learner))


def sample_of(group: Group, rollout: Rollout) -> Sample:
    return Sample(group, rollout, 0.0, np.zeros(rollout.num_trained_tokens, int))


def make_batch(trainer: Trainer, drift: float = 0.0) -> list[Group]:
    """Groups of random completions; behaviour is the trainer's present policy plus noise of `drift`."""
    generator = np.random.default_rng(3)
    groups = []
    for index in range(4):
        lengths = generator.integers(2, 9, 2)
        rollouts = [
            make_rollout(float(i), tokens=tuple(generator.integers(5, 500, n).tolist())) for i, n in enumerate(lengths)
        ]
        group = msgspec.structs.replace(make_group(f"0-{index}"), rollouts=rollouts)
        for rollout in rollouts:
            (m,) = pack([sample_of(group, rollout)], 1000)
            with torch.no_grad():
                logprobs = trainer.policy.logprobs(m).numpy()
            noise = generator.normal(0, drift, len(logprobs)).astype(np.float32)
            rollout.segments[0].behaviour_logprobs[:] = np.minimum(logprobs + noise, 0)
        groups.append(group)
    return groups


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in trainer.policy.published_weights().items()}


def weights_after(config: RunConfig, drift: float = 0.0) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    trainer = make_trainer(config)
    metrics = trainer.train(make_batch(trainer, drift), 0, STEPS)
    return {name: tensor.clone() for name, tensor in tensors_of(trainer).items()}, metrics


def gradients_of(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradients that the only update of a step would have used."""
    trainer = make_trainer(config)
    found: dict[str, torch.Tensor] = {}

    def capture(lr: float) -> float:
        found.update({name: m.grad.clone() for name, m in trainer.optimizer.masters.items() if m.grad is not None})
        return 0.0

    monkeypatch.setattr(trainer.optimizer, "update", capture)
    return found, trainer.train(make_batch(trainer, drift=0.1), 0, STEPS)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_micro_batch_budgets_change_nothing(
    demo_policy: Path, aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = {"loss_aggregation": aggregation, "group_size": 2}
    large, small = ({"micro_batch_tokens": tokens} for tokens in (4096, 24))
    whole, one = gradients_of(make_config(demo_policy, actor=actor, learner=large), monkeypatch)
    split, other = gradients_of(make_config(demo_policy, actor=actor, learner=small), monkeypatch)
    assert len(whole) > 30
    for name, gradient in whole.items():
        assert torch.allclose(gradient, split[name], atol=1e-5 * gradient.abs().max().item() + 1e-8, rtol=1e-3), name
    for name in ("loss", "kl_behaviour_proximal", "ess", "behaviour_weight_max"):
        assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("split", ["groups", "completions"])
def test_samples_of_advantage_0_change_nothing_and_are_not_computed(
    demo_policy: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last group is uniform."""
    actor = {"group_size": 2, "num_mini_batches": 2, "mini_batch_split": split, "dynamic_sampling": False}
    found = []
    for is_all_computed in (False, True):
        trainer = make_trainer(make_config(demo_policy, actor=actor, optimizer={"max_grad_norm": 1e9}))
        if is_all_computed:
            monkeypatch.setattr(
                "headrace.learner.training.trainer.split_among_ranks", partial(computing_all, split_among_ranks)
            )
        groups = make_batch(trainer, drift=0.1)
        groups[-1].rollouts[:] = [msgspec.structs.replace(one, reward=1.0) for one in groups[-1].rollouts]
        metrics = trainer.train(groups, 0, STEPS)
        num_computed = sum(micro_batch.num_sequences for micro_batch, _ in trainer._latest)
        assert num_computed == (8 if is_all_computed else 6)
        found.append((tensors_of(trainer), metrics["gradient_norm"]))
    (few, few_norm), (all_of_them, norm) = found
    assert few_norm == pytest.approx(norm, rel=1e-4)
    for name, weight in all_of_them.items():
        torch.testing.assert_close(few[name], weight, rtol=1e-4, atol=1e-6)


def cut_off(group: Group, *places: int) -> Group:
    rollouts = [
        msgspec.structs.replace(one, finish_reason="length") if index in places else one
        for index, one in enumerate(group.rollouts)
    ]
    return msgspec.structs.replace(group, rollouts=rollouts)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_masked_truncated_completions_count_as_not_sampled(demo_policy: Path, aggregation: str) -> None:
    """In the loss, its counts and the groups' statistics: the weights are the same, whatever the truncated completion's
    reward."""
    actor = {
        "group_size": 3,
        "num_mini_batches": 2,
        "truncated": "mask",
        "loss_aggregation": aggregation,
        "kl_coef": 0.1,
    }
    config = make_config(demo_policy, actor=actor)
    found = []
    for is_sampled in (False, True):
        trainer = make_trainer(config)
        groups = make_batch(trainer, drift=0.1)
        if is_sampled:
            others = [msgspec.structs.replace(group.rollouts[0], reward=7.0) for group in groups]
            groups = [
                cut_off(msgspec.structs.replace(group, rollouts=[*group.rollouts, other]), 2)
                for group, other in zip(groups, others, strict=True)
            ]
        metrics = trainer.train(groups, 0, STEPS)
        assert metrics["truncated_share"] == pytest.approx(is_sampled / 3)
        found.append((tensors_of(trainer), metrics["batch_tokens"], metrics["loss"]))
    (without, tokens, loss), (masked, same_tokens, same_loss) = found
    assert (tokens, loss) == (same_tokens, same_loss)
    assert all(torch.equal(weight, masked[name]) for name, weight in without.items())


def test_an_empty_mini_batch_makes_no_update(demo_policy: Path) -> None:
    """Not even a decay of the weights; if a whole batch is empty, its row has no number that is NaN."""
    actor = {"group_size": 2, "num_mini_batches": 2, "truncated": "mask", "dynamic_sampling": False}
    trainer = make_trainer(make_config(demo_policy, actor=actor, optimizer={"weight_decay": 0.5}))
    before = {name: tensor.clone() for name, tensor in tensors_of(trainer).items()}
    groups = [cut_off(group, 0, 1) for group in make_batch(trainer)]
    row = trainer.train(groups, 0, STEPS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(trainer).items())
    assert all(np.isfinite(value) for value in row.values()), row
    assert (row["batch_tokens"], row["fresh_tokens"], row["gradient_norm"], row["skipped_updates"]) == (0, 0, 0, 0)
    assert trainer.trained_rollouts(groups[0]) == [None, None]
    half = trainer.train([*groups[:3], make_batch(trainer)[3]], 1, STEPS)
    assert half["batch_tokens"] > 0 and np.isfinite(half["loss"])
    assert not all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(trainer).items())


def computing_all(original: Any, *arguments: Any, is_all_computed: bool) -> Any:
    return original(*arguments, is_all_computed=True)


@pytest.mark.parametrize("mini_batches", [1, 3])
def test_proximal_logprobs_are_of_the_weights_before_the_first_update(
    demo_policy: Path, mini_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every mini-batch; the first one, whose own pass gives them, needs no other pass."""
    actor = {"group_size": 2, "num_mini_batches": mini_batches}
    config = make_config(demo_policy, actor=actor, optimizer={"lr": 0.1})
    trainer, before = make_trainer(config), make_trainer(config).policy
    groups, score = make_batch(trainer, drift=0.1), trainer.policy.score
    passes: list[int] = []

    def counted(micro_batch: MicroBatch) -> TokenScores:
        passes.append(id(micro_batch))
        return score(micro_batch)

    monkeypatch.setattr(trainer.policy, "score", counted)
    trainer.train(groups, 0, STEPS)
    first, *later = [id(micro_batch) for micro_batch, _ in trainer._latest]
    assert sorted(passes) == sorted([first, *later, *later])
    for micro_batch, proximal in trainer._latest:
        with torch.no_grad():
            torch.testing.assert_close(proximal, before.logprobs(micro_batch), rtol=0, atol=1e-5)


def test_on_policy_metrics(demo_policy: Path) -> None:
    _, metrics = weights_after(make_config(demo_policy, actor={"group_size": 2, "num_mini_batches": 1}))
    assert metrics["importance_ratio_mean"] == pytest.approx(1.0)
    assert metrics["ess"] == pytest.approx(1.0)
    assert metrics["kl_behaviour_proximal"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["fresh_logprob_gap_rms"] < 1e-4 and metrics["fresh_tokens"] == metrics["batch_tokens"]
    assert "stale_logprob_gap_rms" not in metrics
    assert metrics["skipped_updates"] == 0
    assert 0 <= metrics["padding_share"] < 0.7


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_entropy_is_the_policys_at_the_trained_tokens(demo_policy: Path, mini_batches: int) -> None:
    """Compared with transformers, one completion at a time; with a learning rate of almost 0 later mini-batches have
    the same policy."""
    actor = {"group_size": 2, "num_mini_batches": mini_batches}
    trainer = make_trainer(make_config(demo_policy, actor=actor, optimizer={"lr": 1e-30}))
    groups, entropies = make_batch(trainer), list[float]()
    plain = AutoModelForCausalLM.from_pretrained(demo_policy, dtype=torch.float32)
    for group in groups:
        for rollout in group.rollouts:
            prompt = group.ticket.prompt_tokens
            ids = torch.tensor([[*prompt, *rollout.segments[0].tokens.tolist()]])
            with torch.no_grad():
                logits = plain(ids).logits[0]
            every = (logits[len(prompt) - 1 : -1].double() / group.ticket.sampling.temperature).log_softmax(-1)
            entropies += (-(every.exp() * every).sum(-1)).tolist()
    metrics = trainer.train(groups, 0, STEPS)
    assert metrics["entropy"] == pytest.approx(float(np.mean(entropies)), rel=1e-4)


def test_staleness_splits_the_kl(demo_policy: Path) -> None:
    trainer = make_trainer(make_config(demo_policy, actor={"group_size": 2}))
    metrics = trainer.train(make_batch(trainer, drift=0.2), 2, {1: 0})
    assert metrics["kl_at_staleness_2"] == pytest.approx(metrics["kl_behaviour_proximal"])
    assert metrics["kl_behaviour_proximal"] > 0.005 and metrics["ess"] < 0.99
    assert metrics["fresh_tokens"] == 0 and metrics["token_staleness_mean"] == 2.0
    assert "fresh_logprob_gap_rms" not in metrics
    assert metrics["stale_logprob_gap_rms"] == pytest.approx((2 * metrics["kl_behaviour_proximal"]) ** 0.5, rel=0.2)


def test_a_batch_without_fresh_tokens_measures_numerics_on_a_newer_group(demo_policy: Path) -> None:
    """The gap is computed with the weights before the first update, over tokens of the current version only, and
    nothing else changes: version 3 is this step's, the batch is of the step before."""
    config = make_config(demo_policy, actor={"group_size": 2, "num_mini_batches": 2})
    versions, found = {1: 0, 3: 1}, []
    for is_probed in (False, True):
        trainer = make_trainer(config)
        batch, newer = make_batch(trainer, drift=0.2), make_batch(trainer)[0]
        offset = 0.25
        for rollout in newer.rollouts:
            half = rollout.num_trained_tokens // 2
            rollout.segments[0].version_spans[:] = [
                VersionSpan(1, 0, half),
                VersionSpan(3, half, rollout.num_trained_tokens),
            ]
            rollout.segments[0].behaviour_logprobs[half:] -= offset
            rollout.segments[0].behaviour_logprobs[:half] -= 3
        waiting = [newer] if is_probed else []
        metrics = trainer.train(batch, 1, versions, partial(next, iter(waiting), None))
        found.append((tensors_of(trainer), metrics))
    (without, plain), (weights, probed) = found
    assert all(torch.equal(weight, weights[name]) for name, weight in without.items())
    assert plain["fresh_tokens"] == 0 and "fresh_logprob_gap_rms" not in plain
    assert probed["fresh_tokens"] == sum(-(-one.num_trained_tokens // 2) for one in newer.rollouts)
    for name in ("mean", "rms", "p999"):
        assert probed[f"fresh_logprob_gap_{name}"] == pytest.approx(offset, abs=1e-4)
    own = {name: value for name, value in plain.items() if not name.startswith("fresh") and not name.endswith("_s")}
    assert own == {name: probed[name] for name in own}


def test_a_batch_with_fresh_tokens_does_not_ask_for_another_group(demo_policy: Path) -> None:
    trainer = make_trainer(make_config(demo_policy, actor={"group_size": 2}))
    metrics = trainer.train(make_batch(trainer), 0, STEPS, lambda: pytest.fail("asked"))
    assert metrics["fresh_tokens"] == metrics["batch_tokens"]


def test_with_several_mini_batches_the_ratio_moves_and_the_clip_can_act(demo_policy: Path) -> None:
    config = make_config(
        demo_policy, actor={"group_size": 2, "num_mini_batches": 4, "eps_clip": 1e-4}, optimizer={"lr": 1e-2}
    )
    _, metrics = weights_after(config)
    assert metrics["importance_ratio_max"] > 1.001
    assert metrics["clip_fraction"] > 0


def test_reward_goes_up(demo_policy: Path) -> None:
    """The better of two completions becomes more likely, relative to the worse one."""
    trainer = make_trainer(make_config(demo_policy, actor={"group_size": 2}, optimizer={"lr": 1e-4}))
    groups = make_batch(trainer)

    def margins() -> list[float]:
        found = []
        for group in groups:
            sums = []
            for rollout in group.rollouts:
                (m,) = pack([sample_of(group, rollout)], 1000)
                with torch.no_grad():
                    sums.append(trainer.policy.logprobs(m).mean().item())
            found.append(sums[1] - sums[0])
        return found

    before = margins()
    trainer.train(groups, 0, STEPS)
    assert sum(margins()) > sum(before) + 0.1


def test_kl_to_the_reference_pulls_back(demo_policy: Path) -> None:
    plain, _ = weights_after(make_config(demo_policy, actor={"group_size": 2, "num_mini_batches": 4}))
    anchored, _ = weights_after(
        make_config(demo_policy, actor={"group_size": 2, "num_mini_batches": 4, "kl_coef": 10.0})
    )
    start = tensors_of(make_trainer(make_config(demo_policy)))

    def distance(weights: dict[str, torch.Tensor]) -> float:
        return sum((tensor - start[name]).pow(2).sum().item() for name, tensor in weights.items())

    assert distance(anchored) != distance(plain)


def test_bfloat16_trains_by_the_same_code(demo_policy: Path) -> None:
    config = make_config(demo_policy, actor={"group_size": 2}, model={"dtype": "bfloat16"})
    trainer = make_trainer(config)
    before = {name: tensor.clone() for name, tensor in tensors_of(trainer).items()}
    trainer.train(make_batch(trainer), 0, STEPS)
    changed = [name for name, tensor in tensors_of(trainer).items() if not torch.equal(tensor, before[name])]
    assert len(changed) > len(before) / 2
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors_of(trainer).values())
