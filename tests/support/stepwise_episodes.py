"""A replica's work on one lease, in which an episode goes on only when a test says so, for the model of the protocol.

The ticket processor and `Episodes` are the product's; the environment workers, the gateway's records and the weights
are not.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import msgspec

from headrace.common.config import RunConfig
from headrace.common.tasks import Outcome
from headrace.common.wire import Group, Limits, Rollout, Ticket
from headrace.generation.environments.episodes import Episodes
from headrace.generation.environments.messages import EpisodeStart
from headrace.generation.environments.process import EpisodeFailed, EpisodeInterrupted
from headrace.generation.rollouts import SampledRollouts
from headrace.generation.ticket_processor import TicketProcessor
from headrace.generation.tickets.store import Lease, TicketStore
from tests.support.factories import make_rollout

LIMITS = Limits(max_turns=4, max_tokens=32, max_context_tokens=64, max_segments=1)
EpisodeStep = Literal["turn", "finish", "fail", "interrupt"]


class Record:
    """In place of an `EpisodeRecord`. The text of its rollout names it."""

    def __init__(self, text: str, version: Callable[[], int]) -> None:
        self.text = text
        self.num_turns = 0
        self.unconfirmed: list[Any] = []
        self._version = version

    def rollout(self, reward: float, metrics: dict[str, float], prompts: object, failed_episodes: int) -> Rollout:
        return make_rollout(reward, version=self._version(), text=self.text, failed_episodes=failed_episodes)


class _Waiting(NamedTuple):
    record: Record
    result: asyncio.Future[Outcome]


class StepwiseLease:
    """Every coroutine returns when nothing can go on, or `task` has ended. `group` is what it wants to commit."""

    def __init__(self, config: RunConfig, store: TicketStore, lease: Lease, version: Callable[[], int]) -> None:
        self.lease = lease
        self.group: Group | None = None
        self.task: asyncio.Task[None] | None = None
        self.num_failed: Counter[int] = Counter()
        """By place in the group."""
        self.finished: dict[int, str] = {}
        """Place -> text of the episode that finished."""
        self._config = config
        self._store = store
        self._version = version
        self._num_begun = 0
        self._records: dict[str, Record] = {}
        self._waiting: dict[int, _Waiting] = {}
        pool: Any = SimpleNamespace(run=self._run_episode)
        self._episodes = Episodes(pool, self._open_episode, self._confirm, config.environment)

    async def begin(self) -> None:
        store = self._store
        tickets: Any = SimpleNamespace(
            replica=store.replica,
            commit=self._commit,
            fail=store.fail,
            hand_back=store.hand_back,
            requeue_interrupted=store.requeue_interrupted,
        )
        weights: Any = SimpleNamespace(wait_for_version=self._confirm)
        source: Any = SimpleNamespace(rollouts_of=self._rollouts_of)
        shutdown_budget: Any = SimpleNamespace(run=self._call)
        processor = TicketProcessor(self._config.generation, tickets, source, weights, shutdown_budget)
        self.task = asyncio.create_task(processor.process(self.lease))
        await self._settle()

    async def step(self, place: int, what: EpisodeStep) -> None:
        """Of the episode at this place, if it goes on. One that ends without a turn has failed."""
        waiting = self._waiting.get(place)
        if waiting is None:
            return
        record, result = waiting
        if what == "turn":
            record.num_turns += 1
        elif what == "interrupt":
            result.set_exception(EpisodeInterrupted("told to"))
        elif what == "finish" and record.num_turns:
            self.finished[place] = record.text
            result.set_result(Outcome(float(place == 0)))
        else:
            self.num_failed[place] += 1
            result.set_result(Outcome(1.0)) if what == "finish" else result.set_exception(EpisodeFailed("told to"))
        await self._settle()

    async def end_worker(self) -> None:
        for _, result in self._waiting.values():
            result.set_exception(EpisodeInterrupted("its worker ended", is_suspect=True))
        await self._settle()

    async def cancel(self) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task])

    async def _settle(self) -> None:
        """Until the task has ended, or every episode waits or has finished, and not all have."""
        assert self.task is not None
        while not self.task.done():
            results = [waiting.result for waiting in self._waiting.values()]
            num_here = len(results) + self._episodes.num_ended["finished"]
            if results and num_here == self.lease.ticket.num_completions and not any(one.done() for one in results):
                return
            await asyncio.sleep(0)

    async def _rollouts_of(self, ticket: Ticket) -> SampledRollouts:
        found = await self._episodes.run(msgspec.structs.replace(ticket, limits=LIMITS))
        return SampledRollouts(found.rollouts, found.prompts, 0.0)

    async def _commit(self, lease: Lease, group: Group) -> bool:
        self.group = group
        return await self._store.commit(lease, group)

    @asynccontextmanager
    async def _open_episode(self, ticket: Ticket) -> AsyncIterator[Any]:
        self._num_begun += 1
        name = f"{ticket.id} {self._num_begun}"
        record = self._records[name] = Record(name, self._version)
        yield SimpleNamespace(base_url=name, api_key="", model="", record=record, environment_s=0.0)

    async def _run_episode(self, start: EpisodeStart, _: object, is_suspect: bool) -> Outcome:
        result: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[start.place] = _Waiting(self._records[start.base_url], result)
        try:
            return await result
        finally:
            del self._waiting[start.place]

    async def _confirm(self, *_: object) -> None:
        """At once."""

    async def _call(self, call: Awaitable[None]) -> bool:
        await call
        return True
