"""Writes to Redis that a newer learner of the run fences off: each is one atomic script that checks the epoch first.

A learner takes its epoch at the start. Once a newer learner has started, the next write of the older one raises
`Fenced` and changes nothing. Writes are numbered: `RedisLost` is raised, and nothing changed, if Redis no longer knows
the epoch or lacks a write that it has acknowledged. A write may arrive twice (a retry after a lost reply): scripts and
commands must do no harm then.
"""

import threading
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import redis

from headrace.common.redis.keys import Keys
from headrace.learner.store import scripts

Command = Sequence[str | bytes | int | float]


class Fenced(RuntimeError):
    """A newer learner of this run has started; this one must stop."""


class RedisLost(RuntimeError):
    """Redis no longer has what this learner wrote; the next start resumes from the last checkpoint."""


class FencedRedis:
    """Takes the run's next fencing epoch, which is above `above` in any case."""

    def __init__(self, client: redis.Redis, keys: Keys, above: int = 0) -> None:
        self.client = client
        self.keys = keys
        take_epoch = client.register_script(scripts.TAKE_EPOCH)
        taken_keys = [keys.epoch, keys.epochs, keys.write_number]
        self.epoch = int(take_epoch(keys=taken_keys, args=[uuid.uuid4().hex, above]))
        self._lock = threading.Lock()
        self._num_sent = 0
        self._num_acknowledged = 0
        """The highest number of a write that Redis has acknowledged."""
        self._scripts = {text: client.register_script(text) for text in scripts.FENCED_SCRIPTS}

    def check_fence(self) -> None:
        """Raises `Fenced` or `RedisLost`."""
        self.execute([])

    def execute(self, commands: Iterable[Command]) -> None:
        """Runs all of `commands` atomically, or raises `Fenced` or `RedisLost`."""
        self.run_script(scripts.EXECUTE, [], [part for command in commands for part in (len(command), *command)])

    def run_script(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        """`script`: one of `scripts.FENCED_SCRIPTS`. The fence's keys are put around `keys`, its values before
        `arguments`."""
        is_write = script != scripts.QUEUE_STATE
        with self._lock:
            self._num_sent += is_write
            number, acknowledged = self._num_sent, self._num_acknowledged
        fence = f"{self.epoch} {acknowledged} {number}"
        try:
            reply = self._scripts[script](
                keys=[self.keys.epoch, *keys, self.keys.write_number], args=[fence, *arguments]
            )
        except redis.ResponseError as error:
            if str(error).startswith("FENCED"):
                raise Fenced(f"a learner with an epoch above {self.epoch} has started") from error
            if str(error).startswith(("LOST", "NOGROUP")):
                raise RedisLost(f"Redis has lost what this learner wrote ({error})") from error
            raise
        if is_write:
            with self._lock:
                self._num_acknowledged = max(self._num_acknowledged, number)
        return reply
