"""Polls a run in Redis: the same few commands in one round trip, however many readers control has.

Each poll continues the streams where the last one ended, and reads a bounded number of entries. Invalid heartbeats and
numbers are skipped, so that no content of Redis can stop the polling.
"""

import contextlib
from typing import Any, NamedTuple

import redis
import redis.asyncio

from headrace.common.redis.keys import TICKET_GROUP, Keys
from headrace.common.wire import Heartbeat, WireError, decode_heartbeat, one_line
from headrace.common.wire.desired_state import DesiredState, parse_desired_state
from headrace.control.models.status import Queues

MAX_ROWS = 2000
"""Largest number of entries of a stream in one poll."""
MAX_FIRST_EVENTS = 2000
"""At its start control reads only this many of the newest events."""
MAX_SAMPLE_ROWS = 32
"""Largest number of group samples in one poll; each has up to a megabyte."""
SCAN_COUNT = 1000
MAX_TEXT_CHARS = 500

Entry = tuple[str, dict[bytes, bytes]]
"""An entry of a stream: its id and fields."""


class PollResult(NamedTuple):
    """The state in Redis at one time, and the stream entries since the previous poll."""

    learner: dict[str, str]
    desired_state: DesiredState
    config: bytes | None
    epoch: int
    launcher: str | None
    queues: Queues
    heartbeats: list[Heartbeat]
    events: list[Entry]
    history: list[Entry]
    samples: list[Entry]
    dead_reason: str
    """Reason of the latest dead letter; empty if there is none."""
    is_behind: bool
    """Whether a stream has more entries, so that the next poll should follow at once."""


class RedisPoller:
    """Remembers the known replicas, and the position in each stream."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._events_after: str | None = None
        self._history_after = self._samples_after = "0-0"
        self._scan_cursor = 0
        self._replica_keys: list[bytes] = []
        self.num_commands = 0
        """Commands sent to Redis so far."""

    async def poll(self) -> PollResult:
        """Raises `redis.RedisError`."""
        names = self._replica_keys
        async with self._client.pipeline(transaction=False) as pipe:
            self._queue_commands(pipe, names)
            self.num_commands += len(pipe)
            found: list[Any] = await pipe.execute(raise_on_error=False)
        pending = found.pop(0)  # an error if no ticket has been issued yet
        for answer in found:
            if isinstance(answer, Exception):
                raise answer
        learner, control, config, epoch, launcher, *lengths = found[:9]
        newest_dead, events, history, samples, (cursor, scanned), beats = found[9:]
        self._events_after, is_first = _last_id(events, self._events_after), self._events_after is None
        self._history_after = _last_id(history, self._history_after)
        self._samples_after = _last_id(samples, self._samples_after)
        heartbeats = self._update_replicas(names, beats, cursor, scanned)
        tickets, groups, evaluations, dead = lengths
        leased = pending.get("pending", 0) if isinstance(pending, dict) else 0
        return PollResult(
            learner={_text(name): _text(value) for name, value in learner.items()},
            desired_state=parse_desired_state(control),
            config=config,
            epoch=int(epoch) if epoch is not None and epoch.isdigit() else 0,
            launcher=None if launcher is None else _text(launcher),
            queues=Queues(
                open_tickets=tickets,
                leased_tickets=leased,
                group_stream_length=groups,
                evaluation_tickets=evaluations,
                dead_letters=dead,
            ),
            heartbeats=heartbeats,
            events=_entries(reversed(events) if is_first else events),
            history=_entries(history),
            samples=_entries(samples),
            dead_reason=one_line(_text(newest_dead[0][1].get(b"reason", b""))) if newest_dead else "",
            is_behind=len(history) == MAX_ROWS or len(samples) == MAX_SAMPLE_ROWS or (len(events) >= MAX_ROWS),
        )

    def _queue_commands(self, pipe: Any, names: list[bytes]) -> None:
        keys = self._keys
        pipe.xpending(keys.tickets, TICKET_GROUP)
        pipe.hgetall(keys.learner)
        pipe.hgetall(keys.control)
        pipe.get(keys.config)
        pipe.get(keys.epoch)
        pipe.get(keys.launcher)
        for stream in (keys.tickets, keys.groups, keys.eval_tickets, keys.dead_letters):
            pipe.xlen(stream)
        pipe.xrevrange(keys.dead_letters, count=1)
        if self._events_after is None:
            pipe.xrevrange(keys.events, count=MAX_FIRST_EVENTS)
        else:
            pipe.xrange(keys.events, min=f"({self._events_after}", count=MAX_ROWS)
        pipe.xrange(keys.history, min=f"({self._history_after}", count=MAX_ROWS)
        pipe.xrange(keys.samples, min=f"({self._samples_after}", count=MAX_SAMPLE_ROWS)
        pipe.scan(self._scan_cursor, match=keys.replicas + "*", count=SCAN_COUNT)
        pipe.mget(names or [keys.replicas.encode()])

    def _update_replicas(
        self, names: list[bytes], beats: list[bytes | None], cursor: int, scanned: list[bytes]
    ) -> list[Heartbeat]:
        """A replica is known one poll after its key was found; a large Redis is scanned over several polls."""
        self._scan_cursor = cursor
        live = {name for name, beat in zip(names, beats, strict=False) if beat is not None}
        self._replica_keys = sorted(live | set(scanned))
        heartbeats = {}
        for beat in beats:
            with contextlib.suppress(WireError):
                if beat is not None:
                    heartbeat = decode_heartbeat(beat)
                    heartbeats[heartbeat.replica] = heartbeat
        return [heartbeats[name] for name in sorted(heartbeats)]


def _last_id(rows: list[Any], before: str | None) -> str:
    return max((row[0].decode() for row in rows), key=parse_entry_id, default=before or "0-0")


def parse_entry_id(entry_id: str) -> tuple[int, int]:
    """The id of a stream entry as numbers that compare in stream order."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def _entries(rows: Any) -> list[Entry]:
    return [(entry_id.decode(), fields or {}) for entry_id, fields in rows]


def _text(value: bytes) -> str:
    return value[:MAX_TEXT_CHARS].decode(errors="replace")
