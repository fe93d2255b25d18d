"""What never reaches training although it was sampled for it, beside what does: is the policy trained on short answers?

Groups that are stale at packing, or refused, are the ones that took long: dropping them is a bias that no other number
shows. Counted over the last `WINDOW_STEPS` steps, for few are dropped in one. Uniform groups are no part of it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.common.wire import Group

WINDOW_STEPS = 20
MIN_DROPPED = 4
"""Fewer groups say nothing of a bias: a single one is as long as it is by chance."""


@dataclass
class _Sum:
    """Of groups; lengths and rewards are of their completions."""

    groups: int = 0
    completions: int = 0
    tokens: int = 0
    reward: float = 0.0

    def add(self, group: Group) -> None:
        self.groups += 1
        self.completions += len(group.rollouts)
        self.tokens += sum(len(rollout.tokens) for rollout in group.rollouts)
        self.reward += sum(group.rewards)

    def __add__(self, other: "_Sum") -> "_Sum":
        return _Sum(
            self.groups + other.groups,
            self.completions + other.completions,
            self.tokens + other.tokens,
            self.reward + other.reward,
        )

    @property
    def length(self) -> float:
        return self.tokens / self.completions


class DropStatistics:
    """Since the learner's start: what happened in each step, the one in progress last."""

    def __init__(self) -> None:
        self._steps: deque[tuple[_Sum, _Sum]] = deque([(_Sum(), _Sum())], maxlen=WINDOW_STEPS)

    def add_dropped(self, group: Group) -> None:
        self._steps[-1][0].add(group)

    def add_trained(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self._steps[-1][1].add(group)

    def end_step(self) -> dict[str, float]:
        """The step's numbers. `dropped_groups` is its own. Of the last `WINDOW_STEPS`: `dropped_share`, of the groups
        that were trained or dropped; `dropped_length_bias`, by what share the completions that were trained are
        shorter, on average, than those and the dropped ones together, below 0 if they are longer, 0 while fewer than
        `MIN_DROPPED` are; and where there are both `dropped_completion_tokens_mean` and `dropped_reward_mean`."""
        dropped, trained = (sum(column, _Sum()) for column in zip(*self._steps, strict=True))
        found = {
            "dropped_groups": float(self._steps[-1][0].groups),
            "dropped_share": dropped.groups / max(1, dropped.groups + trained.groups),
            "dropped_length_bias": 0.0,
        }
        if dropped.completions and trained.completions:
            found |= {
                "dropped_completion_tokens_mean": dropped.length,
                "dropped_reward_mean": dropped.reward / dropped.completions,
            }
            if dropped.groups >= MIN_DROPPED:
                found["dropped_length_bias"] = 1.0 - trained.length / (dropped + trained).length
        self._steps.append((_Sum(), _Sum()))
        return found
