"""The episodes of a ticket: begun, retried alone when they fail, and collected into the rollouts of its group.

An episode that failed is begun again up to `environment.episode_attempts` times, and never becomes a reward; the others
of its group are kept. One that was interrupted is begun again too, which counts for nothing.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

import numpy as np

from headrace.common.config.environment import EnvironmentConfig
from headrace.common.tasks import Outcome
from headrace.common.wire import Rollout, Ticket
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.environments.messages import EpisodeStart
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.environments.process import EpisodeFailed, EpisodeInterrupted
from headrace.generation.environments.seeds import seed_of
from headrace.generation.gateway.group_prompts import GroupPrompts
from headrace.generation.gateway.segments import EpisodeRecord

MAX_INTERRUPTIONS = 10
"""Of one episode: then its ticket is interrupted."""
NEVER_SAMPLED = "it ended without a reply of the model: there is nothing to train on"
_log = logging.getLogger(__name__)


class OpenEpisode(Protocol):
    """An episode that may use the gateway."""

    base_url: str
    api_key: str
    model: str
    record: EpisodeRecord

    @property
    def environment_s(self) -> float:
        """Seconds for which none of its requests has been under way; 0 while one is."""
        ...


class EpisodesFailed(Exception):
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
    record: EpisodeRecord
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

    async def run(self, ticket: Ticket) -> GroupOfEpisodes:
        """Plays `ticket.num_completions` episodes. Raises `EpisodesFailed`, `EpisodeInterrupted`, or `EngineDown` if a
        version that sampled for them is not confirmed."""
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
        failed: list[EpisodeRecord] = []
        num_interrupted, is_suspect = 0, False
        while True:
            attempt = len(failed) + num_interrupted
            async with self._open_episode(ticket) as episode:
                start = _start_of(ticket, place, attempt, episode)
                problem: EpisodeFailed | EpisodeInterrupted
                try:
                    outcome = await self._pool.run(start, lambda: episode.environment_s, is_suspect)  # noqa: B023
                except (EpisodeFailed, EpisodeInterrupted) as error:
                    problem = error
                else:
                    if episode.record.num_turns:
                        return _Ended(episode.record, outcome, len(failed))
                    problem = EpisodeFailed(NEVER_SAMPLED)
            _log.info("episode %d of %d: %s", place + 1, ticket.num_completions, problem, extra={"ticket": ticket.id})
            if isinstance(problem, EpisodeInterrupted):
                num_interrupted, is_suspect = num_interrupted + 1, is_suspect or problem.is_suspect
                if num_interrupted >= MAX_INTERRUPTIONS:
                    raise problem
                continue
            failed.append(episode.record)
            if len(failed) >= self._num_attempts:
                text = f"ticket {ticket.id}: episode {place + 1} of {ticket.num_completions}: {problem}"
                raise EpisodesFailed(text, [record.text for record in failed])


def _start_of(ticket: Ticket, place: int, attempt: int, episode: OpenEpisode) -> EpisodeStart:
    endpoint = (episode.base_url, episode.api_key, episode.model)
    return EpisodeStart(ticket, place, attempt, seed_of(ticket.id, place), *endpoint)
