"""One step: a batch of groups becomes `num_mini_batches` optimizer updates and a row of metrics.

Rewards become advantages over the whole batch, mini-batches become token-budgeted micro-batches, and each adds its
share of its mini-batch's loss, so that no split into micro-batches changes the gradient. On several
ranks each computes a share of every mini-batch, and rank 0 reports what all of them found.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from headrace.common.config import RunConfig
from headrace.common.process.atomic_files import FileEntry
from headrace.common.wire import Group, decode_group, encode
from headrace.learner.algorithm.advantage import group_advantages, normalise_over_tokens, overlong_penalty
from headrace.learner.algorithm.loss import PolicyLoss, policy_loss, reference_kl
from headrace.learner.distributed.state_files import read_state, write_state
from headrace.learner.intake.samples import TrainedRollout
from headrace.learner.model.host_snapshots import Snapshot, Snapshots
from headrace.learner.model.packing import (
    MicroBatch,
    Sample,
    current_version,
    pack,
    split_mini_batches,
    token_staleness,
)
from headrace.learner.model.policy import Policy
from headrace.learner.training.optimizer import MasterAdamW, learning_rate
from headrace.learner.training.rank_batches import MiniBatch, Outcome, combine_reports, report, share_out
from headrace.learner.training.step_metrics import combine, group_metrics, logprob_gaps, off_policy_metrics

Probe = Callable[[], Group | None]


def nothing_fresh() -> None:
    """No group to score."""


class Trainer:
    """Owns the policy, the reference (where its KL is asked for) and the optimizer."""

    def __init__(self, config: RunConfig, policy: Policy) -> None:
        self.config = config
        self.policy = policy
        self.ranks = policy.ranks
        self.reference = None
        if config.actor.kl_coef > 0:
            self.reference = Policy(config.model, config.learner, self.ranks)
        self.optimizer = MasterAdamW(policy.model, config.optimizer, self.ranks, policy.rounded_to)
        self._snapshots = Snapshots()
        self._copied: Snapshot | None = None
        self._latest: list[tuple[MicroBatch, Tensor]] = []
        """What the latest step was made of, with its proximal log-probabilities."""

    def train(
        self, groups: Sequence[Group], step: int, version_steps: Mapping[int, int], probe: Probe = nothing_fresh
    ) -> dict[str, float]:
        """Takes the step after `step` completed ones; returns its metrics, on rank 0. There `probe` is asked, before
        the first update and if no token of the batch is fresh, for a group that has some: it is scored, not trained."""
        started = time.monotonic()
        actor, learner = self.config.actor, self.config.learner
        samples = self._samples(groups, step, version_steps)
        mini_batches = [
            share_out(part, learner.micro_batch_tokens, self.ranks.count, is_all_computed=self.reference is not None)
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
                probed = self._probe(mini_batches, step, version_steps, probe)
            norms.append(self.optimizer.update(lr))
        outcome = self._outcome(mini_batches, losses, proximal)
        if outcome is None:
            return {}
        micro_batches = [m for mini_batch in mini_batches for m in mini_batch.micro_batches]
        logprobs = [one for part in outcome.proximal_logprobs for one in part]
        self._latest = list(zip(micro_batches, logprobs, strict=True))
        return {
            "lr": lr,
            "gradient_norm": max(norms),
            "skipped_updates": float(sum(norm != norm or norm == float("inf") for norm in norms)),
            **combine([loss for part in outcome.losses for loss in part]),
            **off_policy_metrics(micro_batches, logprobs),
            **logprob_gaps(micro_batches, logprobs, probed),
            **group_metrics(groups, actor.truncated),
            "padding_share": _padding_share(micro_batches),
            "proximal_s": proximal_done - started,
            "train_s": time.monotonic() - proximal_done,
        }

    def as_trained(self, group: Group) -> list[TrainedRollout | None]:
        """Of each rollout of a group of the latest step; None where it was not computed."""
        found: dict[int, TrainedRollout] = {}
        for micro_batch, logprobs in self._latest:
            for sample, (start, end) in zip(micro_batch.rows, pairwise(micro_batch.sequence_offsets), strict=True):
                if sample.group is group:
                    found[id(sample.rollout)] = TrainedRollout(sample.advantage, logprobs[start:end].cpu().numpy())
        return [found.get(id(rollout)) for rollout in group.rollouts]

    def copy_state(self) -> None:
        """Everything that a resume needs to take the next step bit for bit the same, into host memory."""
        self._copied = self._snapshots.take(self.optimizer.state_tensors() | random_state())

    def write_copy(self, folder: Path) -> dict[str, FileEntry]:
        """What was copied last, once, in files whose names and checksums are returned; from any thread, whatever is
        trained meanwhile. Raises `OSError` or `SafetensorError` if the disk refuses."""
        copied, self._copied = self._copied, None
        assert copied is not None
        return write_state(folder, copied.tensors, self.ranks.rank, self.ranks.count)

    def load_state(self, folder: Path, files: Sequence[str]) -> None:
        """Whatever the number of ranks that saved it."""
        tensors = read_state(folder, files, self.ranks.rank, self.ranks.count)
        self.optimizer.load_state_tensors(tensors)
        set_random_state(tensors)

    def _samples(self, groups: Sequence[Group], step: int, version_steps: Mapping[int, int]) -> list[Sample]:
        """Of what counts (`actor.truncated`), with advantages among that alone."""
        actor = self.config.actor
        rollouts = [(index, group, one) for index, group in enumerate(groups) for one in group.counted(actor.truncated)]
        lengths = torch.tensor([rollout.num_trained_tokens for _, _, rollout in rollouts])
        rewards = torch.tensor([rollout.reward for _, _, rollout in rollouts], dtype=torch.float64)
        rewards += overlong_penalty(lengths, self.config.sampling.max_new_tokens, actor)
        advantages = group_advantages(rewards, torch.tensor([index for index, _, _ in rollouts]), actor)
        if actor.batch_advantage_norm:
            advantages = normalise_over_tokens(advantages, lengths)
        current = current_version(step, version_steps)
        return [
            Sample(group, rollout, advantage, token_staleness(rollout, step, version_steps, current))
            for (_, group, rollout), advantage in zip(rollouts, advantages.tolist(), strict=True)
        ]

    def _proximal_logprobs(self, mini_batches: list[MiniBatch]) -> list[list[Tensor]]:
        """By forward passes before the first update; none of the first mini-batch, whose gradient's own pass fills them
        in: until its update, proximal and policy are the same weights."""
        with torch.no_grad():
            later = [[self.policy.score(m).logprobs for m in part.of(self.ranks.rank)] for part in mini_batches[1:]]
        return [[], *later]

    def _probe(
        self, mini_batches: list[MiniBatch], step: int, version_steps: Mapping[int, int], probe: Probe
    ) -> tuple[MicroBatch, Tensor] | None:
        """A micro-batch of another group and its log-probabilities by the weights of the step's beginning, if the batch
        has no fresh token: a learner that never waits has none, for its version is on its way while it trains. By now
        replicas may have answered with it. All ranks compute the same."""
        if any((m.token_staleness == 0).any() for mini_batch in mini_batches for m in mini_batch.micro_batches):
            return None
        group = probe() if self.ranks.rank == 0 else None
        content = self.ranks.hand_out(encode(group) if group is not None else b"")
        if not content:
            return None
        group = group or decode_group(content)
        current = current_version(step, version_steps)
        samples = [
            Sample(group, one, 0.0, token_staleness(one, step, version_steps, current)) for one in group.rollouts
        ]
        micro_batch, *_ = pack(samples, self.config.learner.micro_batch_tokens)
        with torch.no_grad():
            logprobs = self.policy.score(micro_batch).logprobs
        self.policy.let_go()
        return micro_batch, logprobs

    def _accumulate(self, mini_batch: MiniBatch, proximal: list[Tensor]) -> list[PolicyLoss]:
        """Adds the gradient of one mini-batch, of this rank's share; appends to an empty `proximal`."""
        is_known = bool(proximal)
        per_sequence = self.config.actor.loss_aggregation == "sequence_mean"
        total = mini_batch.num_sequences if per_sequence else mini_batch.num_trained_tokens
        losses = []
        for index, micro_batch in enumerate(mini_batch.of(self.ranks.rank)):
            policy_logprobs, entropy = self.policy.score(micro_batch)
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
            loss.backward()
            losses.append(one)
        return losses

    def _outcome(
        self, mini_batches: list[MiniBatch], losses: list[list[PolicyLoss]], proximal: list[list[Tensor]]
    ) -> Outcome | None:
        """Of all ranks' micro-batches, without the empty ones; None on another rank than the first."""
        if self.ranks.is_alone:
            return Outcome(losses, proximal)
        counts = [len(mini_batch.shares[self.ranks.rank]) for mini_batch in mini_batches]
        own = Outcome(
            [part[:count] for part, count in zip(losses, counts, strict=True)],
            [part[:count] for part, count in zip(proximal, counts, strict=True)],
        )
        reports = self.ranks.gather(report(own))
        return combine_reports(reports) if reports else None

    def _kl_loss(self, reference: Policy, micro_batch: MicroBatch, policy_logprobs: Tensor) -> Tensor:
        """Token mean of the KL to the reference, times its coefficient."""
        with torch.no_grad():
            reference_logprobs = reference.logprobs(micro_batch)
        actor = self.config.actor
        kl = reference_kl(policy_logprobs, reference_logprobs, actor.kl_estimator)
        return actor.kl_coef * (kl.mean() if len(kl) else kl.sum())


def random_state() -> dict[str, Tensor]:
    """Torch's, of the CPU and of every GPU, by name."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(tensors: Mapping[str, Tensor]) -> None:
    """What `random_state` returned; a GPU or a rank that was not there then keeps its own."""
    if "random.cpu" in tensors:
        torch.set_rng_state(tensors["random.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"random.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{index}"], index)


def _padding_share(micro_batches: list[MicroBatch]) -> float:
    """Of the rows of attention; nothing else is padded."""
    if not micro_batches:
        return 0.0
    lengths = [[sample.num_tokens for sample in m.rows] for m in micro_batches]
    return 1 - sum(map(sum, lengths)) / sum(len(part) * max(part) for part in lengths)
