"""One training step: from a batch of groups to `num_mini_batches` optimizer updates and a row of metrics.

Advantages are computed over the whole batch. Each mini-batch is split into micro-batches of a token budget, and each
of these adds its share of the mini-batch's loss, so that the gradient does not depend on the split. On several ranks
each rank computes a share of every mini-batch, and rank 0 reports the results of all ranks.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from headrace.common.config import RunConfig
from headrace.common.metrics.task_metrics import mean_metrics
from headrace.common.process.atomic_files import FileEntry
from headrace.common.wire import Group, decode_group, encode
from headrace.learner.algorithm.loss import PolicyLoss, policy_loss, reference_kl
from headrace.learner.distributed.state_files import read_state, write_state
from headrace.learner.intake.samples import TrainedRollout
from headrace.learner.model.host_snapshots import Snapshot, SnapshotPool
from headrace.learner.model.packing import MicroBatch, pack, split_mini_batches
from headrace.learner.model.policy import Policy
from headrace.learner.training.batch_samples import probe_samples, training_samples
from headrace.learner.training.episode_metrics import episode_metrics
from headrace.learner.training.gradient_passes import backward, score_for_gradient
from headrace.learner.training.optimizer import MasterAdamW, learning_rate
from headrace.learner.training.random_state import random_state, set_random_state
from headrace.learner.training.rank_batches import (
    MiniBatch,
    StepOutcome,
    encode_outcome,
    merge_outcomes,
    split_among_ranks,
)
from headrace.learner.training.step_metrics import (
    combine_losses,
    group_metrics,
    logprob_gaps,
    off_policy_metrics,
    padding_share,
)

Probe = Callable[[], Group | None]


def no_probe() -> None:
    """No group to score."""


class Trainer:
    """Owns the policy, the reference policy (if `actor.kl_coef` is above 0) and the optimizer."""

    def __init__(self, config: RunConfig, policy: Policy) -> None:
        self.config = config
        self.policy = policy
        self.ranks = policy.ranks
        self.reference = None
        if config.actor.kl_coef > 0:
            self.reference = Policy(config.model, config.learner, self.ranks)
        self.optimizer = MasterAdamW(policy.model, config.optimizer, self.ranks, policy.rounded_to)
        self._snapshots = SnapshotPool()
        self._copied: Snapshot | None = None
        self._latest: list[tuple[MicroBatch, Tensor]] = []
        """The latest step's micro-batches, each with its proximal log-probabilities."""

    def train(
        self, groups: Sequence[Group], step: int, version_steps: Mapping[int, int], probe: Probe = no_probe
    ) -> dict[str, float]:
        """Takes the step after `step` completed ones; returns its metrics, on rank 0.

        If the batch has no fresh token, rank 0 calls `probe` before the first update for a group that has some; it is
        scored, not trained.
        """
        started = time.monotonic()
        actor, learner = self.config.actor, self.config.learner
        samples = training_samples(groups, self.config, step, version_steps)
        is_all_computed = self.reference is not None
        mini_batches = [
            split_among_ranks(part, learner.micro_batch_tokens, self.ranks.count, is_all_computed=is_all_computed)
            for part in split_mini_batches(samples, actor, f"{self.config.seed}-{step}")
        ]
        proximal = self._proximal_logprobs(mini_batches)
        proximal_done = time.monotonic()

        lr = learning_rate(step, learner.steps, self.config.optimizer)
        losses: list[list[PolicyLoss]] = []
        norms: list[float] = []
        probed: tuple[MicroBatch, Tensor] | None = None
        for mini_batch, found in zip(mini_batches, proximal, strict=True):
            losses.append(self._accumulate(mini_batch, found))
            if not norms:
                probed = self._score_probe(mini_batches, step, version_steps, probe)
            norms.append(self.optimizer.update(lr))
        outcome = self._gather_outcome(mini_batches, losses, proximal)
        if outcome is None:
            return {}
        return {
            "lr": lr,
            "gradient_norm": max(norms),
            "skipped_updates": float(sum(norm != norm or norm == float("inf") for norm in norms)),
            **self._batch_metrics(groups, mini_batches, outcome, probed),
            "proximal_s": proximal_done - started,
            "train_s": time.monotonic() - proximal_done,
        }

    def _batch_metrics(
        self,
        groups: Sequence[Group],
        mini_batches: list[MiniBatch],
        outcome: StepOutcome,
        probed: tuple[MicroBatch, Tensor] | None,
    ) -> dict[str, float]:
        """The metrics of a step's batch; keeps its micro-batches for `trained_rollouts`."""
        micro_batches = [m for mini_batch in mini_batches for m in mini_batch.micro_batches]
        logprobs = [one for part in outcome.proximal_logprobs for one in part]
        self._latest = list(zip(micro_batches, logprobs, strict=True))
        return {
            **combine_losses([loss for part in outcome.losses for loss in part]),
            **off_policy_metrics(micro_batches, logprobs),
            **logprob_gaps(micro_batches, logprobs, probed),
            **group_metrics(groups, self.config.actor.truncated),
            **episode_metrics(groups),
            **mean_metrics((rollout.metrics for group in groups for rollout in group.rollouts), "environment"),
            "padding_share": padding_share(micro_batches),
        }

    def trained_rollouts(self, group: Group) -> list[TrainedRollout | None]:
        """Advantage and proximal log-probabilities of each rollout of a group of the latest step; None for rollouts
        that were not computed."""
        found: dict[int, TrainedRollout] = {}
        for micro_batch, logprobs in self._latest:
            for sample, (start, end) in zip(micro_batch.samples, pairwise(micro_batch.sequence_offsets), strict=True):
                if sample.group is group:
                    found[id(sample.rollout)] = TrainedRollout(sample.advantage, logprobs[start:end].cpu().numpy())
        return [found.get(id(rollout)) for rollout in group.rollouts]

    def copy_state(self) -> None:
        """Copies into host memory what a resume needs to take the next step with bit-identical results."""
        self._copied = self._snapshots.take(self.optimizer.state_tensors() | random_state())

    def write_copy(self, folder: Path) -> dict[str, FileEntry]:
        """Writes the latest copy of the state, once, and returns the files' names and checksums; callable from any
        thread, while training goes on. Raises `OSError` or `SafetensorError`."""
        copied, self._copied = self._copied, None
        assert copied is not None
        return write_state(folder, copied.tensors, self.ranks.rank, self.ranks.count)

    def load_state(self, folder: Path, files: Sequence[str]) -> None:
        """Loads a checkpoint's tensors, whatever number of ranks saved them."""
        tensors = read_state(folder, files, self.ranks.rank, self.ranks.count)
        self.optimizer.load_state_tensors(tensors)
        set_random_state(tensors)

    def _proximal_logprobs(self, mini_batches: list[MiniBatch]) -> list[list[Tensor]]:
        """Computes them by forward passes before the first update. The first mini-batch's list stays empty: until its
        update proximal and policy have the same weights, so `_accumulate` fills it from the gradient's forward pass."""
        with torch.no_grad():
            later = [
                [self.policy.score(m).logprobs for m in part.of_rank(self.ranks.rank)] for part in mini_batches[1:]
            ]
        return [[], *later]

    def _score_probe(
        self, mini_batches: list[MiniBatch], step: int, version_steps: Mapping[int, int], probe: Probe
    ) -> tuple[MicroBatch, Tensor] | None:
        """If the batch has no fresh token: a micro-batch of another group, and its log-probabilities by the weights at
        the start of the step. A learner that never waits has no fresh tokens, because its version is still being
        published when it takes a batch; by now replicas may have answered with it. All ranks compute the same."""
        if any((m.token_staleness == 0).any() for mini_batch in mini_batches for m in mini_batch.micro_batches):
            return None
        group = probe() if self.ranks.rank == 0 else None
        content = self.ranks.broadcast_bytes(encode(group) if group is not None else b"")
        if not content:
            return None
        samples = probe_samples(group or decode_group(content), step, version_steps)
        micro_batch, *_ = pack(samples, self.config.learner.micro_batch_tokens)
        with torch.no_grad():
            logprobs = self.policy.score(micro_batch).logprobs
        self.policy.reshard()
        return micro_batch, logprobs

    def _accumulate(self, mini_batch: MiniBatch, proximal: list[Tensor]) -> list[PolicyLoss]:
        """Adds the gradient of this rank's share of one mini-batch; fills `proximal` if it is empty."""
        is_known = bool(proximal)
        per_sequence = self.config.actor.loss_aggregation == "sequence_mean"
        total = mini_batch.num_sequences if per_sequence else mini_batch.num_trained_tokens
        losses = []
        for index, micro_batch in enumerate(mini_batch.of_rank(self.ranks.rank)):
            policy_logprobs, entropy = scores = score_for_gradient(self.policy, micro_batch)
            if not is_known:
                proximal.append(policy_logprobs.detach())
            one = policy_loss(
                policy_logprobs,
                proximal[index],
                self.policy.to_device(micro_batch.behaviour_logprobs.copy()),
                self.policy.to_device(micro_batch.advantages),
                torch.ones_like(policy_logprobs),
                self.config.actor,
                sequence_offsets=self.policy.to_device(micro_batch.sequence_offsets),
            )
            one.metrics["entropy"] = entropy.double().mean().item() if len(entropy) else 0.0
            loss = one.loss * (one.weight / total)
            if self.reference is not None:
                share = micro_batch.num_trained_tokens / mini_batch.num_trained_tokens
                loss = loss + self._kl_loss(self.reference, micro_batch, policy_logprobs) * share
            backward(self.policy, micro_batch, loss, scores)
            losses.append(one)
        return losses

    def _gather_outcome(
        self, mini_batches: list[MiniBatch], losses: list[list[PolicyLoss]], proximal: list[list[Tensor]]
    ) -> StepOutcome | None:
        """The results of all ranks' micro-batches without the empty ones, on rank 0; None on the others."""
        if self.ranks.is_alone:
            return StepOutcome(losses, proximal)
        counts = [len(mini_batch.shares[self.ranks.rank]) for mini_batch in mini_batches]
        own = StepOutcome(
            [part[:count] for part, count in zip(losses, counts, strict=True)],
            [part[:count] for part, count in zip(proximal, counts, strict=True)],
        )
        reports = self.ranks.gather_bytes(encode_outcome(own))
        return merge_outcomes(reports) if reports else None

    def _kl_loss(self, reference: Policy, micro_batch: MicroBatch, policy_logprobs: Tensor) -> Tensor:
        """The token mean of the KL to the reference, times `actor.kl_coef`."""
        with torch.no_grad():
            reference_logprobs = reference.logprobs(micro_batch)
        actor = self.config.actor
        kl = reference_kl(policy_logprobs, reference_logprobs, actor.kl_estimator)
        return actor.kl_coef * (kl.mean() if len(kl) else kl.sum())
