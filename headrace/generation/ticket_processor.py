"""Turns one leased ticket into a scored group, a failed attempt, an interruption or a hand-back.

A bad reply of the engine or a failed reward uses one of the ticket's attempts. A cause in this replica uses none:
weights that did not arrive in time, or a drain. An engine that goes down counts as an interruption, of which a ticket
may have more than attempts.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable

import redis

from headrace.common.config import GenerationConfig
from headrace.common.process.logs import log_context
from headrace.common.wire import MAX_GROUP_BYTES, Group, Ticket, Timings, WireError, check_group, encode
from headrace.generation.engine.client import EngineError
from headrace.generation.engine.supervisor import EngineDown
from headrace.generation.environments.episodes import EpisodesFailed
from headrace.generation.environments.process import EpisodeInterrupted
from headrace.generation.rewards.process import RewardError
from headrace.generation.rollouts import RolloutSource, SampledRollouts
from headrace.generation.tickets.retry_elsewhere import HAND_BACK_DELAY_S
from headrace.generation.tickets.store import Lease, TicketStore
from headrace.generation.weights.updater import WeightUpdater

SHUTDOWN_BUDGET_S = 1.0
SPENT_BUDGET_S = 0.1
_log = logging.getLogger(__name__)


class ShutdownBudget:
    """Bounds the time that a replica gives Redis while it ends: `SHUTDOWN_BUDGET_S` a call, and `SPENT_BUDGET_S` once a
    call has failed."""

    def __init__(self) -> None:
        self._timeout_s = SHUTDOWN_BUDGET_S

    async def run(self, call: Awaitable[None]) -> bool:
        """Awaits `call` and returns whether Redis accepted it in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await call
        except (TimeoutError, redis.RedisError):
            self._timeout_s = SPENT_BUDGET_S
            return False
        return True


class TicketProcessor:
    """Processes leases; `groups_committed` and `tokens_generated` count committed groups and their tokens."""

    def __init__(
        self,
        config: GenerationConfig,
        tickets: TicketStore,
        rollouts: RolloutSource,
        weights: WeightUpdater,
        shutdown_budget: ShutdownBudget,
    ) -> None:
        self.groups_committed = 0
        self.tokens_generated = 0
        self._config = config
        self._tickets = tickets
        self._rollouts = rollouts
        self._weights = weights
        self._shutdown_budget = shutdown_budget

    async def process(self, lease: Lease) -> None:
        """Generates, scores and commits the ticket's group; hands the ticket back if cancelled."""
        max_attempts = self._config.max_attempts
        if lease.num_deliveries > max_attempts:
            reason = f"delivered {lease.num_deliveries} times without an answer"
            await self._tickets.fail(lease, reason, max_attempts)
            return
        with log_context(ticket=lease.ticket.id):
            _log.info("leased, for version %d or later", lease.ticket.min_weight_version)
            async with self._handed_back_if_cancelled(lease):
                await self._process(lease, max_attempts)

    async def hand_back_later(self, lease: Lease) -> None:
        """Hands the ticket back after `HAND_BACK_DELAY_S`, so that another replica can lease it."""
        with log_context(ticket=lease.ticket.id):
            _log.info("leased, but left to another replica: it failed on this one")
        async with self._handed_back_if_cancelled(lease):
            await asyncio.sleep(HAND_BACK_DELAY_S)
            await self._tickets.hand_back(lease)

    @contextlib.asynccontextmanager
    async def _handed_back_if_cancelled(self, lease: Lease) -> AsyncIterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            if not await self._shutdown_budget.run(self._tickets.hand_back(lease)):
                _log.warning("cannot be handed back; its lease will expire", extra={"ticket": lease.ticket.id})
            raise

    async def _process(self, lease: Lease, max_attempts: int) -> None:
        ticket, leased_s = lease.ticket, time.time()
        try:
            await self._weights.wait_for_version(ticket.min_weight_version, self._config.weights_timeout_s)
            group = self._group(ticket, await self._rollouts.rollouts_of(ticket), leased_s)
        except (EngineDown, EpisodeInterrupted) as error:
            await self._tickets.requeue_interrupted(lease, str(error))
        except TimeoutError:
            _log.warning(
                "version %d did not arrive within %g s; ticket handed back",
                ticket.min_weight_version,
                self._config.weights_timeout_s,
            )
            await self._tickets.hand_back(lease)
        except (RewardError, EpisodesFailed) as error:
            await self._tickets.fail(lease, str(error), max_attempts, error.completions)
        except (EngineError, WireError) as error:
            await self._tickets.fail(lease, str(error), max_attempts)
        else:
            if not await self._tickets.commit(lease, group):
                _log.info("commit rejected: another replica has claimed or answered this ticket")
                return
            self.groups_committed += 1
            self.tokens_generated += group.num_trained_tokens
            versions = f"{group.oldest_version} to {group.newest_version}"
            _log.info("committed, sampled by versions %s", versions, extra={"version": group.newest_version})

    def _group(self, ticket: Ticket, found: SampledRollouts, leased_s: float) -> Group:
        """Raises `WireError` if the learner would refuse it."""
        timings = Timings(leased_s, found.sampled_s, time.time())
        group = Group(ticket, found.rollouts, self._tickets.replica, timings, found.prompts)
        check_group(group)
        if ticket.limits is not None and (size := len(encode(group))) > MAX_GROUP_BYTES:
            raise WireError(f"ticket {ticket.id} has a group of {size:,} bytes, more than {MAX_GROUP_BYTES:,}")
        return group
