"""The rollouts of a task with `rollout`: the gateway, the environment workers and the episodes of each ticket."""

import asyncio
import contextlib
import logging
import time

from headrace.common.config import RunConfig
from headrace.common.metrics.families import Families
from headrace.common.models.bridge import Bridge
from headrace.common.models.template_loading import load_bridge
from headrace.common.wire import Ticket
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.environments.episodes import Episodes, EpisodesFailed
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.gateway.server import Gateway
from headrace.generation.rollouts import SampledRollouts

MODEL_NAME = "policy"
"""What the gateway's clients are told."""
_log = logging.getLogger(__name__)


class EpisodeRollouts:
    def __init__(self, config: RunConfig, supervisor: EngineSupervisor) -> None:
        self.problem = ""
        self.drain_s = config.environment.drain_s
        self._config = config
        self._supervisor = supervisor
        self._stack = contextlib.AsyncExitStack()
        self._pool = EnvironmentPool(config.task, config.environment)
        self._gateway: Gateway | None = None
        self._episodes: Episodes | None = None

    async def start(self) -> None:
        """Raises `WorkerError` if a worker cannot load or enter the task, `ValueError` if the model has no usable chat
        template."""
        self._stack.push_async_callback(self._pool.close)
        bridge, _ = await asyncio.gather(asyncio.to_thread(load_bridge, self._config.model), self._pool.start())
        self._gateway = await self._open_gateway(bridge)
        self._episodes = Episodes(
            self._pool,
            self._gateway.open_episode,
            self._supervisor.wait_until_confirmed,
            self._config.environment,
        )

    async def close(self) -> None:
        await self._stack.aclose()

    async def rollouts_of(self, ticket: Ticket) -> SampledRollouts:
        assert self._episodes is not None, "rollouts_of() is called after start()"
        if ticket.tools:
            await self._supervisor.check_tool_calls()
        try:
            found = await self._episodes.run(ticket)
        except EpisodesFailed as error:
            self.problem = str(error)
            raise
        self.problem = ""
        return SampledRollouts(found.rollouts, found.prompts, time.time())

    def collect(self, families: Families, replica: str) -> None:
        families.gauge(
            "headrace_replica_episodes", "Episodes that are being played.", self._pool.num_playing, replica=replica
        )
        if self._episodes is None or self._gateway is None:
            return
        for outcome, count in self._episodes.num_ended.items():
            families.counter(
                "headrace_replica_episodes_total",
                "Episodes by how they ended.",
                count,
                replica=replica,
                outcome=outcome,
            )
        families.histogram(
            "headrace_replica_episode_seconds", "Duration of episodes.", self._episodes.seconds, replica=replica
        )
        for status, count in self._gateway.answers.items():
            families.counter(
                "headrace_replica_gateway_requests_total",
                "Requests of environments at the gateway, by the status of the answer.",
                count,
                replica=replica,
                status=str(status),
            )

    async def _open_gateway(self, bridge: Bridge) -> Gateway:
        config = self._config
        gateway = Gateway(
            self._supervisor, bridge, config.environment, MODEL_NAME, system_prompt=config.task.system_prompt
        )
        await self._stack.enter_async_context(gateway.serve())
        for line in gateway.rendering.probe.problems:
            _log.warning("the chat template: %s", line)
        return gateway
