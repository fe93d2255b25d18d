"""How many replicas a launcher keeps: the number set by `headrace scale`, else the learner's advice where the recipe
follows it (`generation.autoscale`), else the recipe's number.

While a launcher reads the target it announces itself in Redis under a key that expires, so that a command is refused
where no launcher would follow it. Nothing here blocks: while Redis is away the latest number stands.
"""

import os
import socket
from contextlib import suppress
from typing import NamedTuple

import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire.desired_state import DESIRED_REPLICAS, PAUSED, STOP, Launcher, parse_desired_replicas
from headrace.launcher.run.redis_server import short_timeout_client

REDIS_TIMEOUT_S = 1.0
PRESENCE_TTL_S = 10.0


class Target(NamedTuple):
    """A number of replicas, and its source as text."""

    replicas: int
    origin: str
    shortfall: str = ""
    """Why the number is lower than requested; empty if it is not."""


class ReplicaTarget:
    """The target of a run's launcher. `start` is the recipe's number."""

    def __init__(self, redis_url: str, keys: Keys, start: int, max_advised: int, max_replicas: int) -> None:
        """`max_advised`: advice is followed up to this number; 0: advice is ignored. `max_replicas`: as many as this
        machine has devices for."""
        self._client = short_timeout_client(redis_url, REDIS_TIMEOUT_S)
        self._keys = keys
        self._max_advised = min(max_advised, max_replicas)
        self._max_replicas = max_replicas
        self.start = Target(start, "as configured")
        self._latest = self.start

    def clear_stop_and_pause(self) -> None:
        """Removes a stop or a pause that was meant for the run's previous launch."""
        self._client.hdel(self._keys.control, PAUSED, STOP)

    def clear(self) -> None:
        """Removes the number that `headrace scale` set for the run's previous launch."""
        self._client.hdel(self._keys.control, DESIRED_REPLICAS)

    def poll(self) -> Target:
        """The present target. Raises `ValueError` naming an invalid one."""
        try:
            with self._client.pipeline(transaction=False) as pipe:
                presence = Launcher(f"{socket.gethostname()} process {os.getpid()}", self._max_replicas)
                pipe.set(self._keys.launcher, str(presence), px=int(PRESENCE_TTL_S * 1000))
                pipe.hget(self._keys.control, DESIRED_REPLICAS)
                pipe.hmget(self._keys.learner, "advised_replicas", "advice")
                _, desired, (advised, reason) = pipe.execute()
        except redis.RedisError:
            return self._latest
        if desired is not None:
            self._latest = self._as_far_as_possible(parse_desired_replicas(_text(desired)))
        elif advised is not None and self._max_advised:
            number = max(1, min(parse_desired_replicas(_text(advised)), self._max_advised))
            self._latest = Target(number, f"as advised: {_text(reason or b'')}")
        else:
            self._latest = self.start
        return self._latest

    def _as_far_as_possible(self, number: int) -> Target:
        """At most as many as there are devices for; the number may have been set when the run had others."""
        if number <= self._max_replicas:
            return Target(number, "as requested")
        shortfall = f"{number} replicas are requested, and the GPUs here are enough for {self._max_replicas}"
        return Target(self._max_replicas, "as far as the GPUs go", shortfall)

    def close(self) -> None:
        """Removes the presence key: this launcher no longer follows a target."""
        with suppress(redis.RedisError):
            self._client.delete(self._keys.launcher)
        self._client.close()


def _text(value: bytes) -> str:
    return value[:300].decode(errors="replace")
