"""The episodes of a ticket: begun, retried alone when they fail, and collected into the rollouts of its group.

An episode that failed is begun again up to `environment.episode_attempts` times, and never becomes a reward; the others
of its group are kept. One that was interrupted is begun again too, which counts for nothing.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

import numpy as np

from headrace.common.config.environment import EnvironmentConfig
from headrace.common.metrics.families import LONG_S, Histogram
from headrace.common.tasks import Outcome
from headrace.common.wire import Rollout, Ticket
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.environments.messages import EpisodeStart
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.environments.process import EpisodeFailed, EpisodeInterrupted
from headrace.generation.environments.seeds import seed_of
from headrace.generation.gateway.group_prompts import GroupPrompts
from headrace.generation.workers.process import WorkerError

MAX_INTERRUPTIONS = 10
"""Of one episode: then its ticket is interrupted."""
NEVER_SAMPLED = "it ended without a reply of the model: there is nothing to train on"
_log = logging.getLogger(__name__)


class Record(Protocol):
    """What is recorded of an episode: `EpisodeRecord`, or one without tokens."""

    num_turns: int
    text: str
    """Of the last reply."""
    unconfirmed: list[SampledTurn]

    def rollout(
        self, reward: float, metrics: Mapping[str, float], prompts: GroupPrompts, failed_episodes: int = 0
    ) -> Rollout: ...


class OpenEpisode(Protocol):
    """An episode that may use the gateway."""

    base_url: str
    api_key: str
    model: str

    @property
    def record(self) -> Record: ...

    @property
    def environment_s(self) -> float:
        """Seconds for which none of its requests has been under way; 0 while one is."""
        ...


class EpisodesFailed(WorkerError):
    """One of a ticket's episodes failed as often as it may; the text says which and why."""

    def __init__(self, text: str, completions: list[str]) -> None:
        super().__init__(text)
        self.completions = completions
        """The last replies of the episodes that failed."""


class GroupOfEpisodes(NamedTuple):
    rollouts: list[Rollout]
    prompts: list[np.ndarray]
    """Of its segments, int32, besides the ticket's prompt."""


class _Ended(NamedTuple):
    record: Record
    outcome: Outcome
    num_failed: int


class Episodes:
    """`open_episode`: of the gateway; the episode can use it within the block, and is sealed afterwards.
    `wait_until_confirmed`: as `EngineSupervisor.wait_until_confirmed`."""

    def __init__(
        self,
        pool: EnvironmentPool,
        open_episode: Callable[[Ticket], AbstractAsyncContextManager[OpenEpisode]],
        wait_until_confirmed: Callable[[Iterable[SampledTurn]], Awaitable[None]],
        settings: EnvironmentConfig,
    ) -> None:
        self._pool = pool
        self._open_episode = open_episode
        self._wait_until_confirmed = wait_until_confirmed
        self._num_attempts = settings.episode_attempts
        self.num_ended = Counter(finished=0, failed=0, interrupted=0)
        """Number of episodes by how they ended."""
        self.seconds = Histogram(LONG_S)

    async def run(self, ticket: Ticket) -> GroupOfEpisodes:
        """Plays `ticket.num_completions` episodes. Raises `EpisodesFailed`, `EpisodeInterrupted`, or `EngineDown` if a
        version that sampled for them is not confirmed."""
        if ticket.limits is None:
            raise EpisodesFailed(f"ticket {ticket.id} has no limits: it was issued for a task with `reward`", [])
        playing = [asyncio.create_task(self._play(ticket, place)) for place in range(ticket.num_completions)]
        try:
            ended = await asyncio.gather(*playing)
        finally:
            for one in playing:
                one.cancel()
            await asyncio.gather(*playing, return_exceptions=True)
        await self._wait_until_confirmed([turn for one in ended for turn in one.record.unconfirmed])
        prompts = GroupPrompts(ticket.prompt_tokens)
        rollouts = [
            one.record.rollout(one.outcome.reward, one.outcome.metrics, prompts, one.num_failed) for one in ended
        ]
        return GroupOfEpisodes(rollouts, prompts.further)

    async def _play(self, ticket: Ticket, place: int) -> _Ended:
        failed: list[Record] = []
        interrupted: list[EpisodeInterrupted] = []
        while True:
            start = (ticket, place, len(failed) + len(interrupted))
            record, result = await self._play_once(*start, any(one.is_suspect for one in interrupted))
            if isinstance(result, Outcome):
                self.num_ended["finished"] += 1
                return _Ended(record, result, len(failed))
            _log.info("episode %d of %d: %s", place + 1, ticket.num_completions, result, extra={"ticket": ticket.id})
            if isinstance(result, EpisodeInterrupted):
                self.num_ended["interrupted"] += 1
                interrupted.append(result)
                if len(interrupted) == MAX_INTERRUPTIONS:
                    raise result
                continue
            self.num_ended["failed"] += 1
            failed.append(record)
            if len(failed) == self._num_attempts:
                text = f"ticket {ticket.id}: episode {place + 1} of {ticket.num_completions}: {result}"
                raise EpisodesFailed(text, [one.text for one in failed])

    async def _play_once(
        self, ticket: Ticket, place: int, attempt: int, is_suspect: bool
    ) -> tuple[Record, Outcome | EpisodeFailed | EpisodeInterrupted]:
        """The sealed record, and what came of the episode."""
        async with self._open_episode(ticket) as episode:
            endpoint = (episode.base_url, episode.api_key, episode.model)
            start = EpisodeStart(ticket, place, attempt, seed_of(ticket.id, place), *endpoint)
            began_s = time.monotonic()
            try:
                outcome = await self._pool.run(start, lambda: episode.environment_s, is_suspect)
            except (EpisodeFailed, EpisodeInterrupted) as problem:
                return episode.record, problem
            finally:
                self.seconds.observe(time.monotonic() - began_s)
            if not episode.record.num_turns:
                return episode.record, EpisodeFailed(NEVER_SAMPLED)
        return episode.record, outcome
