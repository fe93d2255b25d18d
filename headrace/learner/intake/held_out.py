"""Held-out accuracy: the result of an evaluation, whose tickets are answered while training goes on.

An evaluation belongs to the step after which it was issued; its tickets need at least that step's version. A completion
counts as the version of its first token; the mean step of these versions is reported beside the mean reward. A dead
evaluation ticket is left out, and counted.

An episode counts like a completion. `num_versions` says how many versions sampled: long episodes may be finished by
later weights. `held_out/<name>` is the mean of what the task measured besides the reward.

`held_out` is the mean reward of all completions. `pass_at_<k>` is the unbiased estimate (arXiv 2107.03374, section 2.1)
of the probability that one of k completions of a prompt passes; a completion passes if its reward is at least 1. With
rewards of 0 and 1 `held_out` and `pass_at_1` are equal.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.common.metrics.task_metrics import mean_metrics
from headrace.common.wire import Group, Ticket
from headrace.learner.algorithm.staleness import step_of

PASSING_REWARD = 1.0


@dataclass
class Evaluation:
    """One evaluation in progress."""

    step: int
    version: int
    waiting_for: set[str]
    num_dead: int = 0
    dead_reason: str = ""
    """Why the latest one died."""
    rewards: list[list[float]] = field(default_factory=list)
    """For each prompt, the rewards of its completions."""
    first_token_steps: list[int] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    """All that sampled, not only first tokens."""
    measured: list[dict[str, float]] = field(default_factory=list)
    """Of each completion, what the task measured besides the reward."""

    @classmethod
    def of(cls, step: int, version: int, tickets: Iterable[Ticket]) -> "Evaluation":
        return cls(step, version, {ticket.id for ticket in tickets})

    def collect(self, group: Group, version_steps: Mapping[int, int]) -> None:
        if group.ticket.id not in self.waiting_for:
            return
        self.waiting_for.remove(group.ticket.id)
        self.rewards.append(group.rewards)
        for rollout in group.rollouts:
            self.first_token_steps.append(step_of(rollout.version_spans[0].version, version_steps))
            self.versions |= {span.version for span in rollout.version_spans}
            self.measured.append(rollout.metrics)

    def mark_dead(self, ticket_id: str, reason: str) -> None:
        self.waiting_for.discard(ticket_id)
        self.num_dead += 1
        self.dead_reason = reason

    @property
    def is_done(self) -> bool:
        return not self.waiting_for

    def result(self) -> dict[str, float]:
        """The metrics of the evaluation's row. Raises `ValueError` if every ticket is dead."""
        if not self.rewards:
            raise ValueError(
                f"all {self.num_dead} evaluation tickets of step {self.step} are dead, the latest: {self.dead_reason}"
            )
        num_completions = len(self.first_token_steps)
        return {
            "step": self.step,
            "weight_version": self.version,
            "held_out": sum(map(sum, self.rewards)) / num_completions,
            **pass_at(self.rewards),
            "first_token_step_mean": sum(self.first_token_steps) / num_completions,
            "num_versions": len(self.versions),
            "num_completions": num_completions,
            "num_dead": self.num_dead,
            **mean_metrics(self.measured, "held_out"),
        }


def pass_at(rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """`pass_at_<k>` for k = 1, 2, 4, ... up to as many completions as every prompt has."""
    num_samples = min(map(len, rewards))
    passed = [sum(reward >= PASSING_REWARD for reward in prompt) for prompt in rewards]
    found = {}
    for k in (2**power for power in range(num_samples.bit_length())):
        failing = [
            math.comb(len(prompt) - num, k) / math.comb(len(prompt), k)
            for prompt, num in zip(rewards, passed, strict=True)
        ]
        found[f"pass_at_{k}"] = 1 - sum(failing) / len(failing)
    return found
