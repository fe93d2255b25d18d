"""Builds a replica from its parts, and closes those that were created, also if a later one fails."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from headrace.common.config import ModelConfig, RunConfig
from headrace.common.process.waiting import Waits
from headrace.common.redis.client import OUTAGE_DEADLINE_S, connect_async
from headrace.common.redis.keys import Keys
from headrace.generation.engine.client import Engine, SwapTimings
from headrace.generation.engine.server import EngineServer
from headrace.generation.engine.supervisor import EngineSupervisor
from headrace.generation.episode_rollouts import EpisodeRollouts
from headrace.generation.loop import Replica
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.rollouts import RewardedCompletions, RolloutSource
from headrace.generation.tickets.store import TicketStore
from headrace.generation.weights.downloads import Fetcher
from headrace.generation.weights.free_space import check_capacity
from headrace.generation.weights.local_weights import LocalWeights
from headrace.generation.weights.swap_slots import SwapSlots
from headrace.generation.weights.updater import WeightUpdater, local_model_folder
from headrace.generation.weights.version_fetch import FetchedVersion

MODEL_DEADLINE_S = 3600.0
_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def assemble_replica(
    config: RunConfig,
    keys: Keys,
    redis_url: str,
    token: str,
    name: str,
    url: str,
    log_folder: Path,
    waits: Waits,
    has_rollout: bool = False,
    shares_gpu: bool = False,
) -> AsyncIterator[Replica]:
    """A replica that is ready to `serve`; all of its parts are closed when the block ends.

    `has_rollout`: the task has `rollout` in place of `reward`. `shares_gpu`: the engine gets the part of the GPU's
    memory that `learner.memory_fraction` leaves. Raises `InsufficientSpace` if the weights do not fit into the folder
    for them.
    """
    settings = config.generation
    async with contextlib.AsyncExitStack() as stack:
        client = connect_async(redis_url, waits, deadline_s=OUTAGE_DEADLINE_S)
        stack.push_async_callback(client.aclose)
        tickets = TicketStore(client, keys, name)
        await tickets.open()

        async def announce(timings: SwapTimings, fetched: FetchedVersion) -> None:
            event = {"replica": name, "weight_version": fetched.local.manifest.version, "bytes": fetched.num_bytes}
            event |= {"fetch_ms": fetched.fetch_s * 1e3, "apply_ms": fetched.apply_s * 1e3}
            await tickets.announce(
                "weight_swap", event | {"pause_ms": timings.pause_s * 1e3, "load_ms": timings.load_s * 1e3}
            )

        swap_slots = SwapSlots(client, keys, name, settings.max_concurrent_swap_share)
        model = await _model_folder(config.model)
        local = LocalWeights(model)
        weights = WeightUpdater(client, keys, local, Fetcher(token), swap_slots, announce)
        stack.push_async_callback(weights.close)
        check_capacity(local.root, model, config.model.dtype)
        server, engine_url = None, settings.engine.url
        if engine_url is None:
            log = log_folder / f"sglang-{name}.log"
            learner_fraction = config.learner.memory_fraction if shares_gpu else None
            trusted = config.model.trust_remote_code
            server = EngineServer(
                settings.engine,
                config.model.dtype,
                log,
                learner_fraction,
                trusted,
                environment=config.environment if has_rollout else None,
                chat_template=config.model.chat_template,
            )
            stack.push_async_callback(server.stop)
            engine_url = server.url
        engine = Engine(
            engine_url,
            swap_mode=settings.engine.swap_mode,
            completion_timeout_s=settings.completion_timeout_s,
            tool_call_parser=config.environment.tool_call_parser,
            reasoning_parser=config.environment.reasoning_parser,
        )
        stack.push_async_callback(engine.aclose)
        supervisor = EngineSupervisor(
            engine,
            server,
            weights.startup_weights,
            liveness_timeout_s=settings.engine.liveness_timeout_s,
            busy_timeout_s=settings.completion_timeout_s,
        )
        make_rollouts = _episodes if has_rollout else _completions
        rollouts = make_rollouts(config, supervisor, stack)
        yield Replica(name, url, settings, tickets, supervisor, rollouts, weights, waits, config.num_eval_slots)


def _completions(config: RunConfig, supervisor: EngineSupervisor, stack: contextlib.AsyncExitStack) -> RolloutSource:
    settings = config.generation
    rewards = RewardPool(
        config.task.name,
        config.task.settings,
        num_workers=settings.reward_workers,
        deadline_s=settings.reward_deadline_s,
        memory_bytes=settings.reward_memory_bytes,
    )
    stack.push_async_callback(rewards.close)
    return RewardedCompletions(supervisor, rewards)


def _episodes(config: RunConfig, supervisor: EngineSupervisor, stack: contextlib.AsyncExitStack) -> RolloutSource:
    episodes = EpisodeRollouts(config, supervisor)
    stack.push_async_callback(episodes.close)
    return episodes


async def _model_folder(model: ModelConfig) -> Path:
    """The folder with the model's files; raises `TimeoutError` if the hub does not deliver them in time."""
    _log.info("the model to start from: %s", model.path)
    async with asyncio.timeout(MODEL_DEADLINE_S):
        return await asyncio.to_thread(local_model_folder, model)
