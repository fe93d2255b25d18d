"""Reads the run's state from Redis and decides whether the run has recovered from a fault.

It has recovered when a step that began after the fault began was completed after the fault ended, and when every
replica since then has sent a heartbeat that says `running` and has committed a group that it leased after the end. A
heartbeat alone proves nothing: a replica whose engine is dead goes on reporting for a while. The observer bypasses the
proxy, and ignores a Redis that is away.
"""

import time
from contextlib import suppress
from typing import Any

import msgspec
import redis

from chaos.episodes.groups import GroupChecks
from headrace.common.redis.keys import Keys
from headrace.common.wire import WireError, decode_heartbeat
from headrace.launcher.run.redis_server import short_timeout_client

REDIS_TIMEOUT_S = 1.0
MAX_READ = 1000


class StepEvent(msgspec.Struct):
    step: int
    time_s: float
    step_s: float


class _Timings(msgspec.Struct):
    leased_s: float


class _Answer(msgspec.Struct):
    """The fields of a group that matter here."""

    replica: str
    timings: _Timings


class Observer:
    """Observes the run; `poll` must be called regularly. All times are unix times in seconds."""

    def __init__(self, url: str, keys: Keys, num_replicas: int, group_checks: GroupChecks) -> None:
        self.client = short_timeout_client(url, REDIS_TIMEOUT_S)
        self.keys = keys
        self.num_replicas = num_replicas
        self.group_checks = group_checks
        self.step = 0
        """The step that was completed last; a restarted learner repeats some."""
        self.step_began_s = 0.0
        self.step_ended_s = 0.0
        self.ended_s: dict[int, float] = {}
        """When each step was completed, the last time if it was repeated."""
        self._seen_event = "-"
        self._seen_groups = {keys.groups: "-", keys.eval_groups: "-"}
        """By stream: after which entry to read on."""
        self._beats: dict[str, tuple[int, float, str]] = {}
        """By replica: remaining time to live of its heartbeat, when that last came, its state."""
        self._leased_s: dict[str, float] = {}
        """By replica: the lease time of the newest lease that became a group."""

    def poll(self) -> None:
        with suppress(redis.RedisError):
            self._take_steps()
            for stream in self._seen_groups:
                self._take_groups(stream)
            self._take_heartbeats()

    def has_recovered(self, began_s: float, ended_s: float) -> bool:
        """Whether the run has recovered from a fault that lasted from `began_s` to `ended_s`."""
        is_learning = self.step_began_s > began_s and self.step_ended_s > ended_s
        return is_learning and len(self.serving_since(ended_s)) >= self.num_replicas

    def serving_since(self, ended_s: float) -> list[str]:
        """The replicas that have committed a group since then and report that they run."""
        return [
            name
            for name, (_, came_s, state) in self._beats.items()
            if state == "running" and came_s > ended_s and self._leased_s.get(name, 0.0) > ended_s
        ]

    def describe(self) -> str:
        states = ", ".join(
            f"{name} {state} {time.time() - came_s:.0f} s ago" for name, (_, came_s, state) in self._beats.items()
        )
        learner = self.learner()
        return (
            f"step {self.step}, completed {time.time() - self.step_ended_s:.0f} s ago; learner: "
            f"{learner.get('phase', 'no phase')} {learner.get('reason', '')}; replicas: {states or 'none'}"
        )

    def learner(self) -> dict[str, str]:
        """The learner's fields; empty while Redis is away."""
        with suppress(redis.RedisError):
            found: dict[bytes, bytes] = self.client.hgetall(self.keys.learner)
            return {name.decode(): value.decode(errors="replace") for name, value in found.items()}
        return {}

    def epoch(self) -> int:
        with suppress(redis.RedisError):
            return int(self.client.get(self.keys.epoch) or 0)
        return 0

    def close(self) -> None:
        self.client.close()

    def _take_steps(self) -> None:
        for entry_id, fields in self._new_entries(self.keys.events, self._seen_event):
            self._seen_event = f"({entry_id}"
            if fields.get(b"kind") == b"step":
                event = msgspec.json.decode(fields[b"event"], type=StepEvent)
                self.step = event.step
                self.step_ended_s = self.ended_s[event.step] = event.time_s
                self.step_began_s = event.time_s - event.step_s

    def _take_groups(self, stream: str) -> None:
        for entry_id, fields in self._new_entries(stream, self._seen_groups[stream]):
            self._seen_groups[stream] = f"({entry_id}"
            payload = fields.get(b"group", b"")
            self.group_checks.take(entry_id, fields.get(b"id", b"?").decode(), payload)
            with suppress(msgspec.MsgspecError):
                answer = msgspec.msgpack.decode(payload, type=_Answer)
                newest = max(answer.timings.leased_s, self._leased_s.get(answer.replica, 0.0))
                self._leased_s[answer.replica] = newest

    def _new_entries(self, stream: str, after: str) -> list[tuple[str, dict[bytes, bytes]]]:
        found: Any = self.client.xrange(stream, min=after, count=MAX_READ)
        return [(entry_id.decode(), fields) for entry_id, fields in found]

    def _take_heartbeats(self) -> None:
        """A heartbeat has come when its time to live has grown."""
        for key in self.client.scan_iter(match=self.keys.replicas + "*", count=1000):
            left_ms, payload = int(self.client.pttl(key)), self.client.get(key)
            with suppress(WireError):
                beat = decode_heartbeat(payload or b"")
                before_ms, came_s, _ = self._beats.get(beat.replica, (0, 0.0, ""))
                came_s = time.time() if left_ms > before_ms else came_s
                self._beats[beat.replica] = (left_ms, came_s, beat.state)
