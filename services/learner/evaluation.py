"""Held-out accuracy: evaluation tickets beside admission, collected while training goes on.

An evaluation belongs to the step after which it was issued, and its tickets ask for at least that step's
version. Each completion counts for the version of its first token, whose mean step is reported beside the mean
reward. A dead evaluation ticket is left out, and counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from common.wire import Group, Ticket
from services.learner.staleness import step_of


@dataclass
class Evaluation:
    """One evaluation in progress."""

    step: int
    waiting_for: set[str]
    num_dead: int = 0
    rewards: list[float] = field(default_factory=list)
    first_token_steps: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, step: int, tickets: Iterable[Ticket]) -> "Evaluation":
        return cls(step, {ticket.id for ticket in tickets})

    def collect(self, group: Group, version_steps: Mapping[int, int]) -> None:
        if group.ticket.id not in self.waiting_for:
            return
        self.waiting_for.remove(group.ticket.id)
        for rollout in group.rollouts:
            self.rewards.append(rollout.reward)
            self.first_token_steps.append(step_of(rollout.version_spans[0].version, version_steps))

    def give_up(self, ticket_id: str) -> None:
        self.waiting_for.discard(ticket_id)
        self.num_dead += 1

    @property
    def is_done(self) -> bool:
        return not self.waiting_for

    def result(self) -> dict[str, float]:
        """Raises `ValueError` if every ticket died."""
        if not self.rewards:
            raise ValueError(f"all {self.num_dead} evaluation tickets of step {self.step} are dead")
        return {
            "step": self.step,
            "held_out": sum(self.rewards) / len(self.rewards),
            "first_token_step_mean": sum(self.first_token_steps) / len(self.first_token_steps),
            "num_completions": len(self.rewards),
            "num_dead": self.num_dead,
        }
