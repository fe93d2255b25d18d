"""Plays tickets with the parts of a replica: an engine on the recipe's model, or a remote model in its place."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from headrace.common.config import RunConfig
from headrace.common.models.template_loading import load_bridge
from headrace.common.wire import Ticket, decode_ticket
from headrace.common.wire.trial_report import Ready, RolloutReport, TrialEvent, TrialRequest
from headrace.generation.engine.client import Engine
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.engine.server import EngineServer
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.gateway.server import EpisodeServer, Gateway
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.trial.completions import EngineCompletions, PlayedCompletions, RemoteCompletions
from headrace.generation.trial.episodes import PlayedEpisodes, shown_episodes
from headrace.generation.trial.relay import RelayedEpisode
from headrace.generation.trial.remote import RemoteModel
from headrace.generation.weights.updater import local_model_folder

MODEL_NAME = "policy"
VERSION = 0
"""Weight version of the recipe's model."""
Play = Callable[[Ticket], Awaitable[RolloutReport]]


async def play(request: TrialRequest, send: Callable[[TrialEvent], None]) -> None:
    """Sends a report of each ticket, in their order.

    Raises `EngineError` if the engine does not start, `WorkerError` if the task cannot be loaded, `ValueError` if
    SGLang or the model's files are missing.
    """
    config = RunConfig.model_validate_json(request.config)
    tickets = [decode_ticket(ticket) for ticket in request.tickets]
    async with AsyncExitStack() as stack:
        make = _episodes if request.has_rollout else _completions
        play_one = await make(config, request, any(ticket.tools for ticket in tickets), stack)
        send(Ready())
        playing = [asyncio.ensure_future(play_one(ticket)) for ticket in tickets]
        try:
            for one in playing:
                send(await one)
        finally:
            await _cancel(playing)


async def _episodes(config: RunConfig, request: TrialRequest, has_tools: bool, stack: AsyncExitStack) -> Play:
    settings = config.environment.model_copy(update={"episode_attempts": 1})
    pool = EnvironmentPool(config.task, settings)
    stack.push_async_callback(pool.close)
    if request.base_url:
        remote = _remote(config, request, stack)
        relay = EpisodeServer(
            lambda ticket, base_url, secret: RelayedEpisode(ticket, base_url, secret, remote, settings.constrained)
        )
        await pool.start()
        await stack.enter_async_context(relay.serve())
        return PlayedEpisodes(pool, relay.open_episode, _nothing_to_confirm, settings).play
    engine, bridge, _ = await _together(
        _start_engine(config, True, stack), asyncio.to_thread(load_bridge, config.model), pool.start()
    )
    if has_tools:
        await engine.check_tool_calls()
    gateway = Gateway(engine, bridge, settings, MODEL_NAME, system_prompt=config.task.system_prompt)
    await stack.enter_async_context(gateway.serve())
    return PlayedEpisodes(pool, shown_episodes(gateway), engine.wait_until_confirmed, settings).play


async def _completions(config: RunConfig, request: TrialRequest, has_tools: bool, stack: AsyncExitStack) -> Play:
    settings = config.generation
    rewards = RewardPool(
        config.task.name,
        config.task.settings,
        num_workers=settings.reward_workers,
        deadline_s=settings.reward_deadline_s,
        memory_bytes=settings.reward_memory_bytes,
    )
    stack.push_async_callback(rewards.close)
    if request.base_url:
        await rewards.start()
        return PlayedCompletions(RemoteCompletions(_remote(config, request, stack)).sample, rewards).play
    engine, _ = await _together(_start_engine(config, False, stack), rewards.start())
    return PlayedCompletions(EngineCompletions(engine).sample, rewards).play


def _remote(config: RunConfig, request: TrialRequest, stack: AsyncExitStack) -> RemoteModel:
    remote = RemoteModel(request.base_url, request.model, config.task.system_prompt)
    stack.push_async_callback(remote.aclose)
    return remote


async def _start_engine(config: RunConfig, has_rollout: bool, stack: AsyncExitStack) -> Engine:
    """The recipe's external engine, as it is, or one that is started on the recipe's model."""
    settings, environment = config.generation, config.environment
    url = settings.engine.url
    if url is None:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-try-"))) / "sglang.log"
        server = EngineServer(
            settings.engine,
            config.model.dtype,
            log,
            trust_remote_code=config.model.trust_remote_code,
            environment=environment if has_rollout else None,
            chat_template=config.model.chat_template,
        )
        stack.push_async_callback(server.stop)
        await server.start(await asyncio.to_thread(local_model_folder, config.model), VERSION)
        url = server.url
    engine = Engine(
        url,
        swap_mode=settings.engine.swap_mode,
        completion_timeout_s=settings.completion_timeout_s,
        tool_call_parser=environment.tool_call_parser,
        reasoning_parser=environment.reasoning_parser,
    )
    stack.push_async_callback(engine.aclose)
    await engine.weight_version()  # raises if an external engine does not answer
    return engine


async def _nothing_to_confirm(turns: Iterable[SampledTurn]) -> None:
    """A remote model has no versions."""


async def _together(*starts: Awaitable[Any]) -> list[Any]:
    """The results of all; if one raises, the others are cancelled and have ended."""
    tasks = [asyncio.ensure_future(one) for one in starts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
