"""One episode for each ticket, and what was said in it, also if it failed."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, cast

from headrace.common.config.environment import EnvironmentConfig
from headrace.common.wire import Ticket
from headrace.common.wire.trial_report import RolloutReport
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.environments.episodes import Episodes, EpisodesFailed, OpenEpisode
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.environments.process import EpisodeInterrupted
from headrace.generation.gateway.server import Gateway
from headrace.generation.trial.shown_record import ReportedRecord, ShownRecord


class ShownEpisode(OpenEpisode, Protocol):
    @property
    def record(self) -> ReportedRecord: ...


Open = Callable[[Ticket], AbstractAsyncContextManager[ShownEpisode]]


class PlayedEpisodes:
    """`open_episode`: as `EpisodeServer.open_episode`; the others are those of `Episodes`."""

    def __init__(
        self,
        pool: EnvironmentPool,
        open_episode: Open,
        wait_until_confirmed: Callable[[Iterable[SampledTurn]], Awaitable[None]],
        settings: EnvironmentConfig,
    ) -> None:
        self._open_episode = open_episode
        self._records: dict[str, ReportedRecord] = {}
        """By ticket, of the latest attempt."""
        self._episodes = Episodes(pool, self._open, wait_until_confirmed, settings)

    async def play(self, ticket: Ticket) -> RolloutReport:
        """Of a ticket that asks for one rollout."""
        began_s, problem = time.monotonic(), ""
        try:
            (rollout,) = (await self._episodes.run(ticket)).rollouts
        except (EpisodesFailed, EpisodeInterrupted) as error:
            problem = str(error).removeprefix(f"ticket {ticket.id}: episode 1 of 1: ")
        seconds, record = time.monotonic() - began_s, self._records.get(ticket.id)
        segments = record.segment_reports() if record is not None else []
        if problem:
            return RolloutReport(ticket.id, segments, seconds, problem=problem)
        return RolloutReport(
            ticket.id, segments, seconds, rollout.finish_reason, rollout.reward, metrics=rollout.metrics
        )

    @asynccontextmanager
    async def _open(self, ticket: Ticket) -> AsyncIterator[ShownEpisode]:
        async with self._open_episode(ticket) as episode:
            self._records[ticket.id] = episode.record
            yield episode


def shown_episodes(gateway: Gateway) -> Open:
    """Opens episodes of the gateway whose records keep the messages."""

    @asynccontextmanager
    async def open_episode(ticket: Ticket) -> AsyncIterator[ShownEpisode]:
        async with gateway.open_episode(ticket) as episode:
            episode.record = ShownRecord(ticket, gateway.rendering)
            yield cast(ShownEpisode, episode)

    return open_episode
