"""A replica's loop: lease tickets for the free slots, answer each, commit; beside it the engine, the weights, leases,
heartbeats.

Stateless: whatever it holds when it dies is claimed by another. It outlives an engine that dies or hangs and a Redis
that is away or has lost everything, and says meanwhile what it waits for. Asked to end it does so within seconds,
whatever is away or hangs.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from headrace.common.config import GenerationConfig
from headrace.common.process.waiting import Reason, Waits
from headrace.common.wire import Heartbeat, ReplicaState
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.rewards.pool import RewardPool
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
FIRST_VERSION_TIMEOUT_S = 3600.0
REPORTED_REASONS = (
    Reason.ENGINE_STARTING,
    Reason.ENGINE_SILENT,
    Reason.WAITING_FOR_WEIGHTS,
    Reason.PAUSED,
    Reason.REWARDS_FAILING,
    Reason.NO_TICKETS,
)


class Replica:
    """Answers tickets with one engine until it drains."""

    def __init__(
        self,
        name: str,
        url: str,
        config: GenerationConfig,
        tickets: TicketStore,
        supervisor: EngineSupervisor,
        rewards: RewardPool,
        weights: WeightUpdater,
        waits: Waits,
        num_eval_slots: int,
    ) -> None:
        """`num_eval_slots`: evaluation groups that it works on at one time."""
        self.name = name
        self.url = url
        self.config = config
        self.tickets = tickets
        self.supervisor = supervisor
        self.rewards = rewards
        self.weights = weights
        self.waits = waits
        self._num_eval_slots = num_eval_slots
        self.is_paused = False
        self._shutdown_budget = ShutdownBudget()
        self._processor = TicketProcessor(config, tickets, supervisor, rewards, weights, self._shutdown_budget)
        self._retry_elsewhere = RetryElsewhere(tickets.client, tickets.keys, name)
        self._in_flight = InFlight()
        self._draining = asyncio.Event()
        self._heartbeat_due = asyncio.Event()
        """For the next heartbeat."""

    async def serve(self) -> None:
        """Until drained. Raises what any of its parts raises."""
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

    def drain(self) -> None:
        """Finishes or hands back what is in flight; `serve` then returns."""
        self._draining.set()

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    def heartbeat(self) -> Heartbeat:
        self.update_waits()
        return Heartbeat(
            replica=self.name,
            url=self.url,
            state=self.state,
            reason=self.reason,
            waits=self.waits.durations_s(),
            weight_version=self.weights.version,
            groups_in_flight=len(self._in_flight),
            groups_committed=self._processor.groups_committed,
            tokens_generated=self._processor.tokens_generated,
            waiting_s=self._in_flight.idle_s,
            serving_s=self._in_flight.serving_s,
            shares_memory=self.weights.shares_memory,
        )

    @property
    def state(self) -> ReplicaState:
        if self.is_draining:
            return "draining"
        if self.supervisor.problem or self.weights.problem:
            return "quarantined"
        if not self._in_flight.is_serving or self.weights.confirmed_incarnation != self.supervisor.incarnation:
            return "starting"
        return "paused" if self.is_paused else "running"

    @property
    def reason(self) -> str:
        problem = self.weights.problem
        return self.supervisor.problem or (f"weights: {problem}" if problem else self.waits.describe())

    async def _until_ready_or_draining(self) -> None:
        ready = asyncio.create_task(self._get_ready())
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({ready, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not self.is_draining:
                await ready
        except TimeoutError:
            raise TimeoutError(f"no weight version to serve within {FIRST_VERSION_TIMEOUT_S:g} s") from None
        finally:
            ready.cancel()
            draining.cancel()

    async def _get_ready(self) -> None:
        """Workers start while the engine does, which takes longer."""
        await self.rewards.start()
        await self.weights.wait_for_version(1, FIRST_VERSION_TIMEOUT_S)

    async def _process_tickets(self) -> None:
        self._in_flight.begin_serving()
        self._heartbeat_due.set()
        keys, config = self.tickets.keys, self.config
        async with asyncio.TaskGroup() as answers:
            streams = {keys.tickets: config.max_groups_in_flight, keys.eval: self._num_eval_slots}
            workers = [
                answers.create_task(self._fill_slots(*stream, answers), name=stream[0]) for stream in streams.items()
            ]
            await self._draining.wait()
            await asyncio.wait([*workers, *self._in_flight.tasks], timeout=DRAIN_TIMEOUT_S)
            for task in (*workers, *self._in_flight.tasks):
                task.cancel()

    async def _fill_slots(self, stream: str, num_slots: int, answers: asyncio.TaskGroup) -> None:
        """Keeps up to `num_slots` tickets of `stream` in flight; silent replicas' tickets first."""
        next_claim = time.monotonic() + self.config.ticket_lease_s
        while not self.is_draining:
            free = num_slots - self._in_flight.num_slots_taken(stream)
            if free == 0 or self.state != "running":
                await self._wait_for_slot()
                continue
            leases: list[Lease] = []
            if time.monotonic() >= next_claim:
                claimed = await self.tickets.claim(stream, free, self.config.ticket_lease_s)
                leases = [lease for lease in claimed if lease not in self._in_flight]
                next_claim = time.monotonic() + self.config.ticket_lease_s / 3
            for lease in leases or await self.tickets.lease(stream, free, LEASE_BLOCK_S):
                if self.state != "running":  # no longer, since the lease was asked for
                    await self.tickets.hand_back(lease)
                elif await self._retry_elsewhere.should_hand_back(lease.ticket):
                    self._in_flight.add(lease, self._processor.hand_back_later(lease), answers, takes_slot=False)
                else:
                    self._in_flight.add(lease, self._processor.process(lease), answers)

    async def _wait_for_slot(self) -> None:
        """Or for a while, after which the state may be another."""
        self._in_flight.slot_freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATE_POLL_S):
                await self._in_flight.slot_freed.wait()

    async def _send_heartbeats(self) -> None:
        """At once where the learner waits for it."""
        while True:
            self._heartbeat_due.clear()
            await self.tickets.write_heartbeat(self.heartbeat(), HEARTBEAT_TTL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await self._heartbeat_due.wait()

    async def _renew(self) -> None:
        await self.tickets.renew(self._in_flight.leases)

    async def _refresh_waits(self) -> None:
        """Also while heartbeats wait for Redis."""
        while True:
            self.update_waits()
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    def update_waits(self) -> None:
        """Brings `waits` up to date, but for the outages of Redis, which its client tells."""
        now = self._current_wait()
        for reason in REPORTED_REASONS:
            if now is None or now[0] is not reason:
                self.waits.over(reason)
        if now is not None:
            self.waits.waiting(*now)

    def _current_wait(self) -> tuple[Reason, str, float | None] | None:
        """Reason, detail and deadline of what keeps this replica from answering tickets, or holds some of them up."""
        supervisor, weights, config = self.supervisor, self.weights, self.config
        if supervisor.server is not None and not supervisor.serving.is_set():
            return Reason.ENGINE_STARTING, supervisor.problem, config.engine.startup_timeout_s
        if supervisor.problem or supervisor.is_overdue:
            return (
                Reason.ENGINE_SILENT,
                supervisor.problem,
                None if supervisor.problem else supervisor.liveness_timeout_s,
            )
        if weights.problem:
            return Reason.WAITING_FOR_WEIGHTS, weights.problem, None
        if (newest := max(weights.awaited_versions, default=0)) > weights.version:
            detail = f"version {newest} is awaited, {weights.version} is served"
            is_first = not self._in_flight.is_serving
            return Reason.WAITING_FOR_WEIGHTS, detail, FIRST_VERSION_TIMEOUT_S if is_first else config.weights_timeout_s
        if self.is_paused:
            return Reason.PAUSED, "", None
        if self.rewards.problem:
            return Reason.REWARDS_FAILING, self.rewards.problem, None
        return (Reason.NO_TICKETS, "", None) if self.state == "running" and not self._in_flight else None


async def _every(interval_s: float, act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await act()
        await asyncio.sleep(interval_s)
