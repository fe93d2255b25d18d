"""Compares the groups that are dropped with those that are trained: is the policy trained on short completions only?

Groups that are stale at packing, or rejected, tend to be those that took long. Dropping them is a bias that no other
metric shows. It is measured over the last `WINDOW_STEPS` steps, because a single step drops few. Uniform groups are not
counted.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.common.wire import Group

WINDOW_STEPS = 20
MIN_DROPPED = 4
"""With fewer groups the bias is reported as 0: the length of one or two is chance."""


@dataclass
class _Totals:
    """Sums over groups and their completions."""

    groups: int = 0
    completions: int = 0
    tokens: int = 0
    reward: float = 0.0

    def add(self, group: Group) -> None:
        self.groups += 1
        self.completions += len(group.rollouts)
        self.tokens += group.num_trained_tokens
        self.reward += sum(group.rewards)

    def __add__(self, other: "_Totals") -> "_Totals":
        return _Totals(
            self.groups + other.groups,
            self.completions + other.completions,
            self.tokens + other.tokens,
            self.reward + other.reward,
        )

    @property
    def mean_tokens(self) -> float:
        return self.tokens / self.completions


class DropStatistics:
    """Counts the groups of each step since the learner's start; the step in progress is the last of `_steps`."""

    def __init__(self) -> None:
        self._steps: deque[tuple[_Totals, _Totals]] = deque([(_Totals(), _Totals())], maxlen=WINDOW_STEPS)

    def add_dropped(self, group: Group) -> None:
        self._steps[-1][0].add(group)

    def add_trained(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self._steps[-1][1].add(group)

    def end_step(self) -> dict[str, float]:
        """The step's metrics. `dropped_groups` counts this step's. The others are over the last `WINDOW_STEPS`:

        `dropped_share`: of the groups that were trained or dropped. `dropped_length_bias`: the share by which trained
        completions are shorter, on average, than trained and dropped ones together; negative if they are longer, 0
        while fewer than `MIN_DROPPED` groups are dropped. `dropped_completion_tokens_mean` and `dropped_reward_mean`:
        only if there are both trained and dropped groups."""
        dropped, trained = (sum(column, _Totals()) for column in zip(*self._steps, strict=True))
        found = {
            "dropped_groups": float(self._steps[-1][0].groups),
            "dropped_share": dropped.groups / max(1, dropped.groups + trained.groups),
            "dropped_length_bias": 0.0,
        }
        if dropped.completions and trained.completions:
            found |= {
                "dropped_completion_tokens_mean": dropped.mean_tokens,
                "dropped_reward_mean": dropped.reward / dropped.completions,
            }
            if dropped.groups >= MIN_DROPPED:
                found["dropped_length_bias"] = 1.0 - trained.mean_tokens / (dropped + trained).mean_tokens
        self._steps.append((_Totals(), _Totals()))
        return found
