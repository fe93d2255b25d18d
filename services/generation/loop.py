"""A replica's loop: lease tickets for the free slots, answer each, commit; beside it leases, claims, heartbeats.

Stateless: whatever it holds when it dies is claimed by another. A ticket that fails here costs it one attempt; a
ticket that fails because the engine is down, or because the replica drains, costs it none.
"""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Literal

from common.config import GenerationConfig
from common.wire import Group, Heartbeat, Rollout, Timings, WireError, check_group
from services.generation.completions import Completion
from services.generation.engine import Engine, EngineError
from services.generation.engine_server import EngineServer
from services.generation.reward_pool import RewardError, RewardPool
from services.generation.tickets import Lease, TicketStore
from services.generation.weights import WeightFollower

LEASE_BLOCK_S = 1.0
BEAT_INTERVAL_S = 1.0
BEAT_TTL_S = 10.0
DRAIN_TIMEOUT_S = 10.0
STATE_POLL_S = 0.2


class Replica:
    """Answers tickets with one engine until it drains."""

    def __init__(
        self,
        name: str,
        url: str,
        config: GenerationConfig,
        tickets: TicketStore,
        engine: Engine,
        server: EngineServer | None,
        rewards: RewardPool,
        weights: WeightFollower,
    ) -> None:
        self.name = name
        self.url = url
        self.config = config
        self.tickets = tickets
        self.engine = engine
        self.server = server
        """None: the engine is somebody else's."""
        self.rewards = rewards
        self.weights = weights
        self.is_paused = False
        self._draining = asyncio.Event()
        self.groups_committed = 0
        self.tokens_generated = 0
        self._answers: dict[tuple[str, str], tuple[Lease, asyncio.Task[None]]] = {}
        """By stream and entry id."""
        self._slot_freed = asyncio.Event()
        self._serving_since: float | None = None
        self._waiting_since: float | None = None
        self._waited_s = 0.0

    async def serve(self) -> None:
        """Until drained. Raises what any of its parts raises."""
        async with asyncio.TaskGroup() as parts:
            background = [parts.create_task(self._beat()), parts.create_task(self._renew())]
            if self.server is not None:
                background.append(parts.create_task(self.server.keep_running(self._engine_start)))
            background.append(parts.create_task(self._follow_weights()))
            await self._until_ready_or_draining()
            await self._answer_tickets()
            while not all(task.done() for task in background):  # a library may swallow a cancellation
                for task in background:
                    task.cancel()
                await asyncio.wait(background, timeout=STATE_POLL_S)
        await self.tickets.leave()

    async def _follow_weights(self) -> None:
        if self.server is not None:
            await self.server.ready.wait()
        await self.weights.follow(self.engine)

    async def _until_ready_or_draining(self) -> None:
        ready, draining = asyncio.create_task(self.weights.at_least(1)), asyncio.create_task(self._draining.wait())
        _, unfinished = await asyncio.wait({ready, draining}, return_when=asyncio.FIRST_COMPLETED)
        for task in unfinished:
            task.cancel()

    async def _answer_tickets(self) -> None:
        self._serving_since = self._waiting_since = time.monotonic()
        keys, config = self.tickets.keys, self.config
        async with asyncio.TaskGroup() as answers:
            await asyncio.gather(
                self._work(keys.tickets, config.max_groups_in_flight, answers),
                self._work(keys.eval, config.max_eval_groups_in_flight, answers),
            )
            await self._finish_or_hand_back()

    def drain(self) -> None:
        """Finishes or hands back what is in flight; `serve` then returns."""
        self._draining.set()
        self._slot_freed.set()

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    @property
    def is_engine_alive(self) -> bool:
        return self.server is None or self.server.ready.is_set()

    def heartbeat(self) -> Heartbeat:
        now = time.monotonic()
        waiting_s = self._waited_s + (now - self._waiting_since if self._waiting_since is not None else 0.0)
        return Heartbeat(
            replica=self.name,
            url=self.url,
            state=self.state,
            reason=self.reason,
            weight_version=self.weights.version,
            groups_in_flight=len(self._answers),
            groups_committed=self.groups_committed,
            tokens_generated=self.tokens_generated,
            waiting_s=waiting_s,
            serving_s=now - self._serving_since if self._serving_since is not None else 0.0,
        )

    @property
    def state(self) -> Literal["starting", "running", "paused", "draining", "quarantined"]:
        if self.is_draining:
            return "draining"
        if not self.is_engine_alive:
            return "starting"
        if self.weights.problem:
            return "quarantined"
        if self._serving_since is None:
            return "starting"
        return "paused" if self.is_paused else "running"

    @property
    def reason(self) -> str:
        if not self.is_engine_alive:
            return "the engine is starting"
        if self.weights.problem:
            return self.weights.problem
        return "" if self._serving_since is not None else "waiting for a first weight version"

    async def _work(self, stream: str, num_slots: int, answers: asyncio.TaskGroup) -> None:
        """Keeps up to `num_slots` tickets of `stream` in flight; silent replicas' tickets first."""
        next_claim = time.monotonic() + self.config.lease_s
        while not self.is_draining:
            free = num_slots - sum(leased_from == stream for leased_from, _ in self._answers)
            if free == 0 or self.state != "running":
                await self._wait_for_slot()
                continue
            leases: list[Lease] = []
            if time.monotonic() >= next_claim:
                claimed = await self.tickets.claim(stream, free, self.config.lease_s)
                leases = [lease for lease in claimed if (stream, lease.entry_id) not in self._answers]
                next_claim = time.monotonic() + self.config.lease_s / 3
            leases = leases or await self.tickets.lease(stream, free, LEASE_BLOCK_S)
            for lease in leases:
                if self.is_paused or self.is_draining:  # asked for while the lease was on its way
                    await self.tickets.hand_back(lease)
                else:
                    self._begin(lease, answers)

    async def _wait_for_slot(self) -> None:
        """Or for a while, after which the state may be another."""
        self._slot_freed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATE_POLL_S):
                await self._slot_freed.wait()

    def _begin(self, lease: Lease, answers: asyncio.TaskGroup) -> None:
        if self._waiting_since is not None:
            self._waited_s += time.monotonic() - self._waiting_since
            self._waiting_since = None
        task = answers.create_task(self._answer(lease), name=f"ticket {lease.ticket.id}")
        self._answers[lease.stream, lease.entry_id] = lease, task
        task.add_done_callback(lambda _: self._end(lease))

    def _end(self, lease: Lease) -> None:
        del self._answers[lease.stream, lease.entry_id]
        self._slot_freed.set()
        if not self._answers:
            self._waiting_since = time.monotonic()

    async def _answer(self, lease: Lease) -> None:
        if lease.num_deliveries > self.config.max_attempts:
            await self.tickets.fail(
                lease, f"delivered {lease.num_deliveries} times, never answered", self.config.max_attempts
            )
            return
        try:
            group = await self._make_group(lease)
            if await self.tickets.commit(lease, group):
                self.groups_committed += 1
                self.tokens_generated += group.num_trained_tokens
        except (EngineError, RewardError, WireError) as error:
            if self.is_engine_alive:
                await self.tickets.fail(lease, str(error), self.config.max_attempts)
            else:
                await self.tickets.hand_back(lease)
        except TimeoutError:  # no weights for it here: not the ticket's fault
            await self.tickets.hand_back(lease)
        except asyncio.CancelledError:
            await self.tickets.hand_back(lease)
            raise

    async def _make_group(self, lease: Lease) -> Group:
        ticket = lease.ticket
        leased_s = time.time()
        async with asyncio.timeout(self.config.lease_s):
            await self.weights.at_least(ticket.min_weight_version)
        completions = await self.engine.generate(ticket)
        sampled_s = time.time()
        rewards = await self.rewards.score(ticket, [completion.text for completion in completions])
        rollouts = [_rollout(completion, reward) for completion, reward in zip(completions, rewards, strict=True)]
        group = Group(ticket, rollouts, self.name, Timings(leased_s, sampled_s, time.time()))
        check_group(group)
        return group

    def _engine_start(self) -> tuple[Path, int | None]:
        """What an engine starts on: the verified weights, once there are any."""
        return self.weights.folder, self.weights.version or None

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self.config.lease_s / 3)
            await self.tickets.renew([lease for lease, _ in self._answers.values()])

    async def _beat(self) -> None:
        while True:
            await self.tickets.beat(self.heartbeat(), BEAT_TTL_S)
            await asyncio.sleep(BEAT_INTERVAL_S)

    async def _finish_or_hand_back(self) -> None:
        running = [task for _, task in self._answers.values()]
        if running:
            await asyncio.wait(running, timeout=DRAIN_TIMEOUT_S)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _rollout(completion: Completion, reward: float) -> Rollout:
    return Rollout(
        tokens=completion.tokens,
        loss_mask=[1] * len(completion.tokens),
        behaviour_logprobs=completion.behaviour_logprobs,
        version_spans=completion.version_spans,
        reward=reward,
        finish_reason=completion.finish_reason,
        text=completion.text,
    )
