"""The learner's side of Redis. Every write is one atomic script that checks the learner's epoch first.

A learner takes its epoch at the start; once a newer one has started, the next write of the older raises `Fenced`
and nothing of it happens; `RedisLost` if Redis no longer knows the epoch. Writes may arrive twice (a retry after a
lost answer) and do no harm then: a ticket id is added once, everything else sets, deletes or acknowledges by name.
"""

import contextlib
import logging
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import redis

from headrace.common.redis.client import stream_entries
from headrace.common.redis.keys import MAX_EVENTS, MAX_HISTORY, MAX_SAMPLES, TICKET_GROUP, Keys
from headrace.common.wire import (
    Heartbeat,
    Ticket,
    TicketState,
    WireError,
    decode_group,
    decode_heartbeat,
    decode_ticket,
    encode,
    one_line,
)
from headrace.common.wire.desired_state import DesiredState, parse_desired_replicas, parse_desired_state
from headrace.common.wire.group_samples import GroupSample
from headrace.common.wire.ledger import LedgerEntry, parse_ledger_entry
from headrace.learner.store import scripts
from headrace.learner.store.row_numbers import numbers_of

DEAD_PAYLOAD_BYTES = 1 << 16
"""How much of a payload that cannot be used is kept in `dead_letters`."""
_log = logging.getLogger(__name__)

Command = Sequence[str | bytes | int | float]


class Fenced(RuntimeError):
    """A newer learner of this run has started; this one must stop."""


class RedisLost(RuntimeError):
    """Redis no longer has what this learner wrote; the next start goes on from the last checkpoint."""


class Cursor(NamedTuple):
    """The next prompt to issue: its position in a pass over the data."""

    data_epoch: int
    position: int


class Entry(NamedTuple):
    """One entry of `groups` or `eval_groups`, read but not yet settled; without a ticket's id if it is gone."""

    stream: str
    entry_id: str
    ticket_id: str
    payload: bytes


class UnusablePrompt(NamedTuple):
    """A place of the data of which no ticket is issued."""

    ticket_id: str
    state: Literal["dead", "skipped"]
    reason: str


class QueueState(NamedTuple):
    """At one instant."""

    open_tickets: int
    """Not yet answered."""
    in_stream: int
    """Groups, consumed ones included."""
    marks: list[LedgerEntry | None]
    """What the ledger says of each ticket; None of one that was never issued."""


class Settlement(NamedTuple):
    """What became of a consumed group."""

    stream: str
    entry_id: str
    ticket_id: str
    state: TicketState


class LearnerStore:
    """Takes the run's next epoch, and one above `above` in any case, and creates the run's streams."""

    def __init__(self, client: redis.Redis, keys: Keys, above: int = 0) -> None:
        self.client = client
        self.keys = keys
        for stream in (keys.tickets, keys.eval_tickets):
            _create_group(client, stream, TICKET_GROUP)
        take_epoch = client.register_script(scripts.TAKE_EPOCH)
        self.epoch = int(take_epoch(keys=[keys.epoch, keys.epochs], args=[uuid.uuid4().hex, above]))
        newest: Any = client.xrevrange(keys.events, count=1)
        self._read_up_to = {keys.groups: "0", keys.eval_groups: "0"}
        self._seen_event = newest[0][0].decode() if newest else "0"
        self._scripts = {
            text: client.register_script(text)
            for text in (
                scripts.EXECUTE,
                scripts.QUEUE_STATE,
                scripts.ADD_TICKETS,
                scripts.SETTLE,
                scripts.DEAD_LETTER,
                scripts.REQUEUE_DEAD,
            )
        }

    def check_fence(self) -> None:
        """Raises `Fenced` or `RedisLost`."""
        self.execute([])

    def execute(self, commands: Iterable[Command]) -> None:
        """All of `commands` atomically, or raises `Fenced`."""
        self._run(scripts.EXECUTE, [], [part for command in commands for part in (len(command), *command)])

    def add_tickets(
        self,
        stream: str,
        tickets: Sequence[Ticket],
        cursor: Cursor | None = None,
        unusable: Sequence[UnusablePrompt] = (),
    ) -> None:
        """Adds those whose id the ledger has never seen, marks what was `unusable`, and moves the data cursor, in one
        step."""
        items: list[tuple[str | bytes, ...]] = [(ticket.id, "open", "ticket", encode(ticket)) for ticket in tickets]
        items += [(one.ticket_id, one.state, "reason" * (one.state == "dead"), one.reason) for one in unusable]
        self._add(stream, cursor, items)

    def add_groups(self, groups: Sequence[tuple[str, bytes]], cursor: Cursor) -> None:
        """Recorded groups, by ticket id, as if replicas had committed them."""
        self._add(self.keys.groups, cursor, [(name, "answered", "group", payload) for name, payload in groups])

    def _add(self, stream: str, cursor: Cursor | None, items: Sequence[tuple[str | bytes, ...]]) -> None:
        place = ("", "") if cursor is None else cursor
        keys = [stream, self.keys.ledger, self.keys.cursor, self.keys.dead_letters]
        self._run(scripts.ADD_TICKETS, keys, [*place, *(part for item in items for part in item)])

    def requeue_dead(self, ticket: Ticket) -> bool:
        """Puts a dead ticket back to work; False if it is not dead any more."""
        keys = [self.keys.ledger, self.keys.tickets, self.keys.dead_letters, self.keys.retries]
        return bool(self._run(scripts.REQUEUE_DEAD, keys, [ticket.id, encode(ticket)]))

    def dead_ticket(self, ticket_id: str) -> Ticket | None:
        """As it died, if that was kept whole."""
        (mark,) = self.marks([ticket_id])
        if mark is None or mark.state != "dead" or not mark.entry_id:
            return None
        entries: Any = self.client.xrange(self.keys.dead_letters, mark.entry_id, mark.entry_id)
        payload = entries[0][1].get(b"payload", b"") if entries else b""
        for decode in (decode_ticket, lambda group: decode_group(group).ticket):
            with contextlib.suppress(WireError):
                return decode(payload)
        return None

    def dead_reason(self, mark: LedgerEntry) -> str:
        """Why the ticket of that mark died; empty if it was purged."""
        entries: Any = self.client.xrange(self.keys.dead_letters, mark.entry_id, mark.entry_id) if mark.entry_id else []
        return one_line(entries[0][1].get(b"reason", b"").decode(errors="replace")) if entries else ""

    def retry_requests(self) -> list[str]:
        """Dead tickets that a person wants answered after all."""
        return sorted(name.decode(errors="replace") for name in self.client.smembers(self.keys.retries))

    def settle(self, settlements: Sequence[Settlement], groups: Literal["delete", "keep"] = "delete") -> None:
        """Writes the final states into the ledger and deletes the groups. `keep`: only where Redis has forgotten."""
        keys = [self.keys.ledger, self.keys.tickets, self.keys.eval_tickets]
        for first in range(0, len(settlements), 1000):  # Lua's stack is bounded
            part = settlements[first : first + 1000]
            self._run(scripts.SETTLE, keys, [groups, *(field for settlement in part for field in settlement)])

    def dead_letter(self, entry: Entry, reason: str) -> bool:
        """A group that cannot be used goes to `dead_letters`, with the reason; False if it is not pending any more."""
        payload = entry.payload[:DEAD_PAYLOAD_BYTES]
        _log.error("group %s is dead: %s", entry.entry_id, reason, extra={"ticket": entry.ticket_id})
        keys = [entry.stream, self.keys.dead_letters, self.keys.ledger]
        arguments = [entry.entry_id, entry.ticket_id, reason, payload, len(entry.payload)]
        return bool(self._run(scripts.DEAD_LETTER, keys, arguments))

    def read(self, count: int, block_s: float) -> list[Entry]:
        """Groups and evaluation groups that this learner has not read yet, or none after `block_s` seconds.

        Only remembers where it is, so that an answer that was lost, or went to a learner that was overtaken, takes
        nothing from anybody.
        """
        found: Any = self.client.xread(self._read_up_to, count=count, block=max(1, int(block_s * 1000)))
        entries = [
            Entry(stream, entry_id.decode(), _text(fields.get(b"id", b"?")), fields.get(b"group", b""))
            for stream, entry_id, fields in stream_entries(found)
        ]
        self._read_up_to |= {entry.stream: entry.entry_id for entry in entries}
        return entries

    def read_unsettled(self) -> list[Entry]:
        """Everything that nobody has settled, whoever has read it; `read` goes on behind it."""
        self._read_up_to = dict.fromkeys(self._read_up_to, "0")
        found: list[Entry] = []
        while entries := self.read(256, 0.0):
            found += entries
        return found

    def queue_state(self, ticket_ids: Sequence[str] = ()) -> QueueState:
        """What a turn of the intake needs beside the groups that it has read, in one command. Raises `Fenced`."""
        keys = [self.keys.tickets, self.keys.groups, self.keys.ledger]
        open_tickets, in_stream, marks = self._run(scripts.QUEUE_STATE, keys, list(ticket_ids))
        return QueueState(int(open_tickets), int(in_stream), _marks(marks))

    def cursor(self) -> Cursor | None:
        epoch, place = self.client.hmget(self.keys.cursor, "epoch", "place")
        return None if epoch is None or place is None else Cursor(int(epoch), int(place))

    def set_data_fingerprint(self, data: bytes, cursor: Cursor) -> None:
        """The cursor is at that place of those data (headrace/learner/intake/data_fingerprint.py)."""
        place = ("epoch", cursor.data_epoch, "place", cursor.position)
        self.execute([("HSET", self.keys.cursor, *place, "data", data)])

    def version_steps(self) -> dict[int, int]:
        return {int(version): int(step) for version, step in self.client.hgetall(self.keys.versions).items()}

    def marks(self, ticket_ids: Sequence[str]) -> list[LedgerEntry | None]:
        """What the ledger says of each ticket; None of one that was never issued."""
        found = self.client.hmget(self.keys.ledger, ticket_ids) if ticket_ids else []
        return _marks(found)

    def unfinished(self) -> list[str]:
        """Tickets that are open or answered, in no order."""
        marks = self.client.hscan_iter(self.keys.ledger, count=1000)
        return [name.decode() for name, mark in marks if parse_ledger_entry(mark).state in ("open", "answered")]

    def num_dead(self) -> int:
        return int(self.client.xlen(self.keys.dead_letters))

    def replicas(self) -> list[Heartbeat]:
        """The replicas whose heartbeat has not expired; invalid ones are skipped."""
        names = sorted(self.client.scan_iter(match=self.keys.replicas + "*", count=1000))
        found = []
        for name, payload in zip(names, self.client.mget(names) if names else [], strict=True):
            try:
                found += [decode_heartbeat(payload)] if payload is not None else []
            except WireError as error:
                _log.warning("%s is no heartbeat: %s", name.decode(errors="replace"), error)
        return found

    def desired_state(self) -> DesiredState:
        return parse_desired_state(self.client.hgetall(self.keys.control))

    def write_control(self, orders: Iterable[Command]) -> None:
        """Commands on the hash of orders, without its key."""
        self.execute([(verb, self.keys.control, *rest) for verb, *rest in orders])

    def advised_replicas(self) -> int | None:
        """What an earlier learner of this run has last advised."""
        try:
            return parse_desired_replicas(_text(self.client.hget(self.keys.learner, "advised_replicas") or b""))
        except ValueError:
            return None

    def set_status(self, status: dict[str, Any]) -> None:
        """Sets fields of the learner's hash, which the page and the command line show."""
        self.execute([("HSET", self.keys.learner, *_flat(status))])

    def add_event(self, kind: str, event: dict[str, Any]) -> None:
        self.execute([self._event(kind, event)])

    def append_row(self, kind: str, row: dict[str, Any]) -> None:
        """The row of a step or an evaluation: an event, and its numbers in the history."""
        numbers = msgspec.json.encode(numbers_of(row))
        history = ("XADD", self.keys.history, "MAXLEN", "~", MAX_HISTORY, "*", "kind", kind, "row", numbers)
        self.execute([self._event(kind, row), history])

    def add_samples(self, groups: Iterable[GroupSample]) -> None:
        """Adds them to what people may read."""
        self.execute([self._sample(group) for group in groups])

    def _sample(self, group: GroupSample) -> Command:
        fields = ("id", group.id, "kind", group.kind, "state", group.state, "step", group.step)
        payload = msgspec.json.encode(group)
        return ("XADD", self.keys.samples, "MAXLEN", "~", MAX_SAMPLES, "*", *fields, "group", payload)

    def _event(self, kind: str, event: dict[str, Any]) -> Command:
        payload = msgspec.json.encode(event)
        return ("XADD", self.keys.events, "MAXLEN", "~", MAX_EVENTS, "*", "kind", kind, "event", payload)

    def take_swap_pauses_ms(self) -> list[float]:
        """How long replicas paused for weight swaps, since the last call."""
        found: Any = self.client.xrange(self.keys.events, min=f"({self._seen_event}", count=MAX_EVENTS)
        if found:
            self._seen_event = found[-1][0].decode()
        swaps = [msgspec.json.decode(fields[b"event"]) for _, fields in found if fields[b"kind"] == b"weight_swap"]
        return [swap["pause_ms"] for swap in swaps]

    def _run(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        try:
            return self._scripts[script](keys=[self.keys.epoch, *keys], args=[self.epoch, *arguments])
        except redis.ResponseError as error:
            if str(error).startswith("FENCED"):
                raise Fenced(f"a learner with an epoch above {self.epoch} has started") from error
            if str(error).startswith(("LOST", "NOGROUP")):
                raise RedisLost(f"Redis has lost what this learner wrote ({error})") from error
            raise


def _create_group(client: redis.Redis, stream: str, group: str) -> None:
    try:
        client.xgroup_create(stream, group, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def _marks(found: Iterable[bytes | None]) -> list[LedgerEntry | None]:
    return [None if mark is None else parse_ledger_entry(mark) for mark in found]


def _text(name: bytes) -> str:
    """An id as it may stand in a log and in an answer."""
    return name[:200].decode(errors="replace")


def _flat(fields: dict[str, Any]) -> list[str]:
    return [str(part) for pair in fields.items() for part in pair]
