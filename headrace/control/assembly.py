"""Builds control from its parts, and closes them in order."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI

from headrace.common.config import ModelConfig, RunConfig, TaskConfig
from headrace.common.http.service import serve_in_loop
from headrace.common.redis.client import connect_async
from headrace.common.redis.keys import Keys
from headrace.control.http.api import make_app
from headrace.control.http.command_writer import CommandWriter
from headrace.control.polling.learner_probe import PROBE_TIMEOUT_S, LearnerProbe
from headrace.control.polling.redis_poll import RedisPoller
from headrace.control.view.event_stream import Hub
from headrace.control.view.run_monitor import RunMonitor

COMMAND_RETRY_S = 3.0
"""How long a command is retried. A poll is not retried, because the next one follows anyway."""


@contextlib.asynccontextmanager
async def running_app(
    run: str, config: RunConfig, redis_url: str, token: str, require_token_for_reads: bool
) -> AsyncIterator[tuple[FastAPI, RunMonitor]]:
    """The app and its monitor, which polls Redis while the block runs. Redis need not answer yet.

    If a background task fails, the block is cancelled and the error raised, so control never serves stale data forever.
    """
    keys = Keys(run)
    async with contextlib.AsyncExitStack() as stack:
        poll_client = connect_async(redis_url, deadline_s=0.0)
        command_client = connect_async(redis_url, deadline_s=COMMAND_RETRY_S)
        for client in (poll_client, command_client):
            stack.push_async_callback(client.aclose)
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=PROBE_TIMEOUT_S))
        hub, probe = Hub(), LearnerProbe(http)
        stack.callback(hub.close)
        monitor = RunMonitor(run, RedisPoller(poll_client, keys), probe, hub, config)
        await monitor.refresh()
        group = await stack.enter_async_context(asyncio.TaskGroup())
        for job in (monitor.follow(), probe.run(), hub.keep_alive()):
            stack.callback(group.create_task(job).cancel)
        yield make_app(monitor, CommandWriter(command_client, keys), http, token, require_token_for_reads), monitor


@contextlib.asynccontextmanager
async def serving(app: FastAPI, monitor: RunMonitor, sock: socket.socket) -> AsyncIterator[None]:
    """Serves the app at the socket while the block runs; at the end it closes the event streams before the server."""
    async with serve_in_loop(app, sock):
        try:
            yield
        finally:
            monitor.hub.close()


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document, from an app that never serves a request."""
    config = RunConfig(model=ModelConfig(path="none"), task=TaskConfig(name="arithmetic"))
    client, http = connect_async("redis://127.0.0.1"), httpx.AsyncClient(trust_env=False)
    keys = Keys("none")
    monitor = RunMonitor(keys.run, RedisPoller(client, keys), LearnerProbe(http), Hub(), config)
    return make_app(monitor, CommandWriter(client, keys), http, "none", require_token_for_reads=False).openapi()
