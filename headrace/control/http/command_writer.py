"""Writes commands to Redis, where learner, replicas and launcher read them, and an event that names the caller.

Commands are stored in Redis only and outlive control. They are idempotent: a write that arrives twice does no harm.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import redis
import redis.asyncio

from headrace.common.config import RunConfig
from headrace.common.config.hot_reload import hot_reloadable_values, with_settings
from headrace.common.redis.keys import MAX_EVENTS, Keys
from headrace.common.wire.desired_state import (
    CHECKPOINTS,
    DESIRED_REPLICAS,
    EVALUATIONS,
    PAUSED,
    SETTINGS,
    STOP,
    Settings,
    parse_desired_state,
)

COMMAND_DEADLINE_S = 5.0
MAX_ATTEMPTS = 10
"""Attempts at a change of settings while others change them at the same time."""

CHANGE_SETTINGS = """
local standing = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if standing ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'kind', 'settings_requested', 'event', ARGV[5])
return 1
"""


class RedisUnavailable(RuntimeError):
    """Redis does not answer, so it is unknown whether the command was stored. Sending it again does no harm."""


class VersionConflict(RuntimeError):
    """The settings have another version than the caller expects."""


class CommandWriter:
    """Writes the commands of one run."""

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
        """None clears the target."""
        keys = self._keys
        command: tuple[Any, ...] = ("HSET", keys.control, DESIRED_REPLICAS, replicas)
        if replicas is None:
            command = ("HDEL", keys.control, DESIRED_REPLICAS)
        await self._write("scale", caller, command, replicas=replicas)

    async def record_drain(self, replica: str, caller: str) -> None:
        """Writes the event only: the request itself went to the replica."""
        await self._write("drain", caller, None, replica=replica)

    async def change_settings(
        self, config: RunConfig, changes: Mapping[str, int | float | None], version: int | None, caller: str
    ) -> Settings:
        """Returns the new settings. `None` resets one. Raises `ValueError` for invalid ones, or `VersionConflict`."""
        configured = hot_reloadable_values(config)
        unknown = [name for name in changes if name not in configured]
        if unknown:
            with_settings(config, {unknown[0]: 0})  # raises, naming what can be changed
        for _ in range(MAX_ATTEMPTS):
            standing = await self._with_deadline(self._client.hget(self._keys.control, SETTINGS)) or b""
            before = parse_desired_state({SETTINGS.encode(): standing}).settings
            if version is not None and version != before.version:
                raise VersionConflict(f"the settings have version {before.version}, not {version}: read them again")
            wanted = {**before.values, **changes}
            values: dict[str, int | float | None] = {
                name: value for name, value in wanted.items() if value is not None and name in configured
            }
            with_settings(config, values)
            settings = Settings(before.version + 1, values)
            if await self._swap_settings(standing, settings, changes, caller):
                return settings
        raise VersionConflict(f"others have changed the settings {MAX_ATTEMPTS} times meanwhile: try again")

    async def _swap_settings(
        self, standing: bytes, settings: Settings, changes: Mapping[str, int | float | None], caller: str
    ) -> bool:
        """False if another change came first."""
        listed = ", ".join(f"{name} {'as configured' if value is None else value}" for name, value in changes.items())
        event = {
            "by": caller,
            "version": settings.version,
            "changes": dict(changes),
            "text": f"settings: {listed}, by {caller}",
        }
        arguments = [SETTINGS, standing, msgspec.json.encode(settings), MAX_EVENTS, msgspec.json.encode(event)]
        keys = [self._keys.control, self._keys.events]
        return bool(await self._with_deadline(self._client.eval(CHANGE_SETTINGS, len(keys), *keys, *arguments)))

    async def _write(self, name: str, caller: str, redis_command: tuple[Any, ...] | None, **details: Any) -> None:
        """In one transaction: the command in Redis, and the event with its name, its caller and its details."""
        listed = "".join(f" {detail} {value}" for detail, value in details.items())
        event = {"command": name, "by": caller, **details, "text": f"command: {name}{listed}, by {caller}"}
        payload = msgspec.json.encode(event)
        async with self._client.pipeline(transaction=True) as pipe:
            if redis_command is not None:
                pipe.execute_command(*redis_command)
            pipe.xadd(self._keys.events, {"kind": "command", "event": payload}, maxlen=MAX_EVENTS, approximate=True)
            await self._with_deadline(pipe.execute())

    async def _with_deadline(self, asked: Any) -> Any:
        try:
            async with asyncio.timeout(COMMAND_DEADLINE_S):
                return await asked
        except (redis.RedisError, OSError, TimeoutError) as error:
            raise RedisUnavailable("Redis does not answer; try again") from error
