"""A replica's loop: leases tickets for free slots and processes them, beside tasks for engine, weights and heartbeats.

A replica is stateless: when it dies, other replicas claim its tickets. It survives an engine that dies or hangs and a
Redis that is unreachable or has lost all its data, and reports meanwhile what it waits for. On a request to end it ends
within seconds, whatever is unreachable or hangs.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from headrace.common.config import GenerationConfig
from headrace.common.process.waiting import Waits
from headrace.common.wire import Heartbeat
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.rollouts import RolloutSource
from headrace.generation.status import FIRST_VERSION_TIMEOUT_S, ReplicaStatus
from headrace.generation.ticket_processor import ShutdownBudget, TicketProcessor
from headrace.generation.tickets.in_flight import InFlight
from headrace.generation.tickets.retry_elsewhere import RetryElsewhere
from headrace.generation.tickets.store import Lease, TicketStore
from headrace.generation.weights.updater import WeightUpdater

LEASE_BLOCK_S = 1.0
HEARTBEAT_INTERVAL_S = 1.0
HEARTBEAT_TTL_S = 10.0
DRAIN_TIMEOUT_S = 2.0
STATE_POLL_S = 0.2


class Replica:
    """Processes tickets with one engine until it is drained."""

    def __init__(
        self,
        name: str,
        url: str,
        config: GenerationConfig,
        tickets: TicketStore,
        supervisor: EngineSupervisor,
        rollouts: RolloutSource,
        weights: WeightUpdater,
        waits: Waits,
        num_eval_slots: int,
    ) -> None:
        """`num_eval_slots`: number of evaluation groups in flight at a time."""
        self.name = name
        self.url = url
        self.config = config
        self.tickets = tickets
        self.supervisor = supervisor
        self.rollouts = rollouts
        self.weights = weights
        self.waits = waits
        self._num_eval_slots = num_eval_slots
        self._shutdown_budget = ShutdownBudget()
        self._processor = TicketProcessor(config, tickets, rollouts, weights, self._shutdown_budget)
        self._retry_elsewhere = RetryElsewhere(tickets.client, tickets.keys, name)
        self._in_flight = InFlight()
        self.status = ReplicaStatus(config, supervisor, weights, rollouts, self._in_flight, waits)
        self._draining = asyncio.Event()
        self._hurried = asyncio.Event()
        """Set when a drain waits no longer for episodes."""
        self._heartbeat_due = asyncio.Event()
        """Set when the next heartbeat must not wait for its interval."""

    async def serve(self) -> None:
        """Runs until drained. Raises any exception of its tasks."""
        async with asyncio.TaskGroup() as parts:
            background = [
                parts.create_task(self.supervisor.run(), name="engine"),
                parts.create_task(self.weights.run(self.supervisor), name="weights"),
                parts.create_task(self._send_heartbeats(), name="heartbeats"),
                parts.create_task(_every(self.config.ticket_lease_s / 3, self._renew), name="leases"),
                parts.create_task(self._refresh_waits(), name="waits"),
            ]
            await self._until_ready_or_draining()
            await self._process_tickets()
            for task in background:
                task.cancel()
        await self._shutdown_budget.run(self.tickets.delete_heartbeat())

    def drain(self, is_hurried: bool = False) -> None:
        """Finishes or hands back the tickets in flight; `serve` then returns. Episodes have `environment.drain_s` to
        end, unless it is hurried, by this call or a later one."""
        self.status.is_draining = True
        self._draining.set()
        if is_hurried:
            self._hurried.set()

    def heartbeat(self) -> Heartbeat:
        self.status.update_waits()
        return Heartbeat(
            replica=self.name,
            url=self.url,
            state=self.status.state,
            reason=self.status.reason,
            waits=self.waits.durations_s(),
            weight_version=self.weights.version,
            groups_in_flight=len(self._in_flight),
            groups_committed=self._processor.groups_committed,
            tokens_generated=self._processor.tokens_generated,
            waiting_s=self._in_flight.idle_s,
            serving_s=self._in_flight.serving_s,
            shares_memory=self.weights.shares_memory,
        )

    async def _until_ready_or_draining(self) -> None:
        ready = asyncio.create_task(self._get_ready())
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({ready, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not self.status.is_draining:
                await ready
        except TimeoutError:
            raise TimeoutError(f"no weight version to serve within {FIRST_VERSION_TIMEOUT_S:g} s") from None
        finally:
            ready.cancel()
            draining.cancel()

    async def _get_ready(self) -> None:
        """Starts the workers while the engine starts, which takes longer."""
        await self.rollouts.start()
        await self.weights.wait_for_version(1, FIRST_VERSION_TIMEOUT_S)

    async def _process_tickets(self) -> None:
        self._in_flight.begin_serving()
        self._heartbeat_due.set()
        keys, config = self.tickets.keys, self.config
        async with asyncio.TaskGroup() as tasks:
            streams = {keys.tickets: config.max_groups_in_flight, keys.eval_tickets: self._num_eval_slots}
            workers = [
                tasks.create_task(self._fill_slots(*stream, tasks), name=stream[0]) for stream in streams.items()
            ]
            await self._draining.wait()
            await self._wait_for_tickets(workers)
            for task in (*workers, *self._in_flight.tasks):
                task.cancel()

    async def _wait_for_tickets(self, workers: list[asyncio.Task[None]]) -> None:
        """Waits for the tickets in flight, as long as a drain may take."""
        finished = asyncio.create_task(asyncio.wait([*workers, *self._in_flight.tasks]))
        hurried = asyncio.create_task(self._hurried.wait())
        drain_s = self.rollouts.drain_s
        await asyncio.wait([finished, hurried], timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([finished], timeout=DRAIN_TIMEOUT_S)
        finished.cancel()
        hurried.cancel()

    async def _fill_slots(self, stream: str, num_slots: int, tasks: asyncio.TaskGroup) -> None:
        """Keeps up to `num_slots` tickets of `stream` in flight; tickets of dead replicas come first."""
        next_claim = time.monotonic() + self.config.ticket_lease_s
        while not self.status.is_draining:
            free = num_slots - self._in_flight.num_slots_taken(stream)
            if free == 0 or self.status.state != "running":
                await self._wait_for_slot()
                continue
            leases: list[Lease] = []
            if time.monotonic() >= next_claim:
                claimed = await self.tickets.claim(stream, free, self.config.ticket_lease_s)
                leases = [lease for lease in claimed if lease not in self._in_flight]
                next_claim = time.monotonic() + self.config.ticket_lease_s / 3
            for lease in leases or await self.tickets.lease(stream, free, LEASE_BLOCK_S):
                if self.status.state != "running":  # the state has changed while the call waited
                    await self.tickets.hand_back(lease)
                elif await self._retry_elsewhere.should_hand_back(lease.ticket):
                    self._in_flight.add(lease, self._processor.hand_back_later(lease), tasks, takes_slot=False)
                else:
                    self._in_flight.add(lease, self._processor.process(lease), tasks)

    async def _wait_for_slot(self) -> None:
        """Returns when a slot is free, or after `STATE_POLL_S`, when the state may have changed."""
        self._in_flight.slot_freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATE_POLL_S):
                await self._in_flight.slot_freed.wait()

    async def _send_heartbeats(self) -> None:
        """Sends one per interval, and one at once when the replica begins to serve: the learner waits for that."""
        while True:
            self._heartbeat_due.clear()
            await self.tickets.write_heartbeat(self.heartbeat(), HEARTBEAT_TTL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await self._heartbeat_due.wait()

    async def _renew(self) -> None:
        await self.tickets.renew(self._in_flight.leases)

    async def _refresh_waits(self) -> None:
        """Updates the waits even while heartbeats wait for Redis."""
        while True:
            self.status.update_waits()
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)


async def _every(interval_s: float, act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await act()
        await asyncio.sleep(interval_s)
