"""Writes what a caller orders where everybody obeys it, and an event of who ordered what beside it, in one step.

Nothing is kept here: an order stands in Redis, and outlives control. A write may arrive twice and does no harm then.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import redis
import redis.asyncio

from headrace.common.config import RunConfig
from headrace.common.config.hot_reload import hot_values, with_settings
from headrace.common.redis.keys import MAX_EVENTS, Keys
from headrace.common.wire.desired_state import (
    CHECKPOINTS,
    DESIRED_REPLICAS,
    EVALUATIONS,
    PAUSED,
    SETTINGS,
    STOP,
    Settings,
    parse_orders,
)

COMMAND_DEADLINE_S = 5.0
MAX_ATTEMPTS = 10
"""Of changes of settings that were overtaken by others."""

CHANGE_SETTINGS = """
local standing = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if standing ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'kind', 'settings', 'event', ARGV[5])
return 1
"""


class RedisUnavailable(RuntimeError):
    """Redis does not answer, so that nobody knows whether the order stands; asked again, it does no harm."""


class VersionConflict(RuntimeError):
    """The settings are of another version than the caller knew."""


class CommandWriter:
    """Of one run."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    async def pause(self, caller: str) -> None:
        await self._write("pause", caller, ("HSET", self._keys.control, PAUSED, time.time()))

    async def resume(self, caller: str) -> None:
        await self._write("resume", caller, ("HDEL", self._keys.control, PAUSED))

    async def stop(self, caller: str) -> None:
        await self._write("stop", caller, ("HSET", self._keys.control, STOP, time.time()))

    async def checkpoint(self, caller: str) -> None:
        await self._write("checkpoint", caller, ("HINCRBY", self._keys.control, CHECKPOINTS, 1))

    async def evaluate(self, caller: str) -> None:
        await self._write("evaluate", caller, ("HINCRBY", self._keys.control, EVALUATIONS, 1))

    async def scale(self, replicas: int | None, caller: str) -> None:
        """None: no number is ordered any more."""
        keys = self._keys
        command: tuple[Any, ...] = ("HSET", keys.control, DESIRED_REPLICAS, replicas)
        if replicas is None:
            command = ("HDEL", keys.control, DESIRED_REPLICAS)
        await self._write("scale", caller, command, replicas=replicas)

    async def record_drain(self, replica: str, caller: str) -> None:
        """The order itself went to the replica."""
        await self._write("drain", caller, None, replica=replica)

    async def change_settings(
        self, config: RunConfig, changes: Mapping[str, int | float | None], version: int | None, caller: str
    ) -> Settings:
        """What stands now. `None`: as configured again. Raises `ValueError` naming what is wrong, or `Overtaken`."""
        configured = hot_values(config)
        unknown = [name for name in changes if name not in configured]
        if unknown:
            with_settings(config, {unknown[0]: 0})  # which says what can be changed
        for _ in range(MAX_ATTEMPTS):
            standing = await self._with_deadline(self._client.hget(self._keys.control, SETTINGS)) or b""
            before = parse_orders({SETTINGS.encode(): standing}).settings
            if version is not None and version != before.version:
                raise VersionConflict(f"the settings are of version {before.version}, not {version}")
            wanted = {**before.values, **changes}
            values: dict[str, int | float | None] = {
                name: value for name, value in wanted.items() if value is not None and name in configured
            }
            with_settings(config, values)
            settings = Settings(before.version + 1, values)
            if await self._swap_settings(standing, settings, changes, caller):
                return settings
        raise VersionConflict("the settings are being changed by others all the time")

    async def _swap_settings(
        self, standing: bytes, settings: Settings, changes: Mapping[str, int | float | None], caller: str
    ) -> bool:
        """False if others were there first."""
        told = ", ".join(f"{name} {'as configured' if value is None else value}" for name, value in changes.items())
        event = {
            "by": caller,
            "version": settings.version,
            "changes": dict(changes),
            "text": f"settings: {told}, by {caller}",
        }
        arguments = [SETTINGS, standing, msgspec.json.encode(settings), MAX_EVENTS, msgspec.json.encode(event)]
        keys = [self._keys.control, self._keys.events]
        return bool(await self._with_deadline(self._client.eval(CHANGE_SETTINGS, len(keys), *keys, *arguments)))

    async def _write(self, order: str, caller: str, command: tuple[Any, ...] | None, **details: Any) -> None:
        told = "".join(f" {name} {value}" for name, value in details.items())
        event = {"order": order, "by": caller, **details, "text": f"ordered: {order}{told}, by {caller}"}
        payload = msgspec.json.encode(event)
        async with self._client.pipeline(transaction=True) as pipe:
            if command is not None:
                pipe.execute_command(*command)
            pipe.xadd(self._keys.events, {"kind": "order", "event": payload}, maxlen=MAX_EVENTS, approximate=True)
            await self._with_deadline(pipe.execute())

    async def _with_deadline(self, asked: Any) -> Any:
        try:
            async with asyncio.timeout(COMMAND_DEADLINE_S):
                return await asked
        except (redis.RedisError, OSError, TimeoutError) as error:
            raise RedisUnavailable("Redis does not answer; try again") from error
