"""How many replicas a launcher is to keep: what was ordered in the run's `control`, else what its recipe says, or the
learner advises where the recipe says to follow that (`generation.autoscale`).

A launcher that follows orders says so in Redis under a key that expires, so that nobody orders into the void. It waits
for nobody: while Redis is away the number of before stands.
"""

import os
import socket
from contextlib import suppress
from typing import NamedTuple

import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire.desired_state import DESIRED_REPLICAS, PAUSED, STOP, Launcher, desired_replicas
from headrace.launcher.run.processes import short_timeout_client

LOOK_TIMEOUT_S = 1.0
PRESENCE_TTL_S = 10.0


class Target(NamedTuple):
    """A number of replicas, and who asks for it, for people."""

    replicas: int
    origin: str
    shortfall: str = ""
    """Why it is fewer than were asked for."""


class ReplicaTarget:
    """Of one run, for its one launcher. `start` is the recipe's number."""

    def __init__(self, redis_url: str, keys: Keys, start: int, max_advised: int, max_replicas: int) -> None:
        """`max_advised`: advice is followed up to this many; 0: not at all. `max_replicas`: as many as this machine
        has devices for."""
        self._client = short_timeout_client(redis_url, LOOK_TIMEOUT_S)
        self._keys = keys
        self._max_advised = min(max_advised, max_replicas)
        self._max_replicas = max_replicas
        self.start = Target(start, "as configured")
        self._latest = self.start

    def begin(self) -> None:
        """A new life of the run neither stops nor pauses because the one before was told to."""
        self._client.hdel(self._keys.control, PAUSED, STOP)

    def withdraw(self) -> None:
        """The number that was ordered for an earlier life of the run no longer stands."""
        self._client.hdel(self._keys.control, DESIRED_REPLICAS)

    def look(self) -> Target:
        """The order that stands now. Raises `ValueError` naming one that cannot be obeyed."""
        try:
            with self._client.pipeline(transaction=False) as pipe:
                presence = Launcher(f"{socket.gethostname()} process {os.getpid()}", self._max_replicas)
                pipe.set(self._keys.launcher, str(presence), px=int(PRESENCE_TTL_S * 1000))
                pipe.hget(self._keys.control, DESIRED_REPLICAS)
                pipe.hmget(self._keys.learner, "advised_replicas", "advice")
                _, ordered, (advised, reason) = pipe.execute()
        except redis.RedisError:
            return self._latest
        if ordered is not None:
            self._latest = self._as_ordered(desired_replicas(_text(ordered)))
        elif advised is not None and self._max_advised:
            number = max(1, min(desired_replicas(_text(advised)), self._max_advised))
            self._latest = Target(number, f"as advised: {_text(reason or b'')}")
        else:
            self._latest = self.start
        return self._latest

    def _as_ordered(self, number: int) -> Target:
        """As far as the devices go: an order may be of a time when the run had others."""
        if number <= self._max_replicas:
            return Target(number, "as ordered")
        shortfall = f"{number} replicas are ordered, and the GPUs here are enough for {self._max_replicas}"
        return Target(self._max_replicas, "as far as the GPUs go", shortfall)

    def leave(self) -> None:
        """From now on nobody obeys."""
        with suppress(redis.RedisError):
            self._client.delete(self._keys.launcher)
        self._client.close()


def _text(value: bytes) -> str:
    return value[:300].decode(errors="replace")
