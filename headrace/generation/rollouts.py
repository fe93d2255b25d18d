"""How a replica answers a ticket: with one completion and its reward for each rollout, or with episodes."""

import time
from typing import NamedTuple, Protocol

import numpy as np

from headrace.common.metrics.families import Families
from headrace.common.tasks import Outcome
from headrace.common.wire import Rollout, Ticket
from headrace.generation.engine.completions import Completion
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.workers.process import TaskError


class SampledRollouts(NamedTuple):
    rollouts: list[Rollout]
    prompts: list[np.ndarray]
    """Of their segments, int32, besides the ticket's prompt."""
    sampled_s: float
    """Unix time at which the last token was sampled."""


class RolloutSource(Protocol):
    """Started while the engine starts."""

    @property
    def problem(self) -> str:
        """The reason why the latest ticket could not be answered; empty after one was."""
        ...

    @property
    def drain_s(self) -> float:
        """How much longer than usual a replica that is drained waits for tickets in flight."""
        ...

    async def start(self) -> None:
        """Raises `WorkerError`."""
        ...

    async def rollouts_of(self, ticket: Ticket) -> SampledRollouts:
        """As many as the ticket asks for. Raises `EngineDown` or `EpisodeInterrupted` if the ticket is not at fault;
        `EngineError`, `RewardError` or `EpisodesFailed`."""
        ...

    def collect(self, families: Families, replica: str) -> None:
        """Adds the metrics of its workers."""
        ...


class RewardedCompletions:
    """The rollouts of a task with `reward`."""

    drain_s = 0.0

    def __init__(self, supervisor: EngineSupervisor, rewards: RewardPool) -> None:
        self._supervisor = supervisor
        self._rewards = rewards

    @property
    def problem(self) -> str:
        return self._rewards.problem

    async def start(self) -> None:
        """Raises `WorkerError` if a worker cannot load the task."""
        if not await self._rewards.start():
            raise TaskError("the task has `rollout` here, and `reward` where the learner runs")

    async def rollouts_of(self, ticket: Ticket) -> SampledRollouts:
        completions = await self._supervisor.generate(ticket)
        sampled_s = time.time()
        outcomes = await self._rewards.score(ticket, [completion.text for completion in completions])
        rollouts = [_rollout(completion, outcome) for completion, outcome in zip(completions, outcomes, strict=True)]
        return SampledRollouts(rollouts, [], sampled_s)

    def collect(self, families: Families, replica: str) -> None:
        families.histogram(
            "headrace_replica_reward_seconds",
            "Seconds that a worker took for a group's rewards.",
            self._rewards.seconds,
            replica=replica,
        )


def _rollout(completion: Completion, outcome: Outcome) -> Rollout:
    return Rollout.of_completion(
        tokens=np.array(completion.tokens, np.int32),
        behaviour_logprobs=completion.behaviour_logprobs,
        version_spans=completion.version_spans,
        reward=outcome.reward,
        finish_reason=completion.finish_reason,
        text=completion.text,
        metrics=outcome.metrics,
    )
