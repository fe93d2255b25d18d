"""The learner's side of Redis: tickets out, groups in, the ledger, dead letters, the control state, the data cursor.

A write that arrives twice (a retry after a lost reply) does no harm: a ticket id is added once, and everything else
sets, deletes or acknowledges by name.
"""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import redis

from headrace.common.redis.client import stream_entries
from headrace.common.redis.keys import TICKET_GROUP, Keys
from headrace.common.wire import (
    Heartbeat,
    Ticket,
    WireError,
    decode_group,
    decode_heartbeat,
    decode_ticket,
    encode,
    one_line,
)
from headrace.common.wire.desired_state import DesiredState, parse_desired_replicas, parse_desired_state
from headrace.common.wire.ledger import LedgerEntry, parse_ledger_entry
from headrace.learner.store import scripts
from headrace.learner.store.fenced_redis import Command, FencedRedis
from headrace.learner.store.run_log import RunLog
from headrace.learner.store.structs import Cursor, Entry, QueueState, Settlement, UnusablePrompt

DEAD_PAYLOAD_BYTES = 1 << 16
"""At most this much of an unusable payload is kept in `dead_letters`."""
_log = logging.getLogger(__name__)


class LearnerStore(FencedRedis):
    """Creates the run's streams. Every write raises `Fenced` or `RedisLost`."""

    def __init__(self, client: redis.Redis, keys: Keys, above: int = 0) -> None:
        for stream in (keys.tickets, keys.eval_tickets):
            _create_group(client, stream, TICKET_GROUP)
        super().__init__(client, keys, above)
        self.run_log = RunLog(self)
        self._read_up_to = {keys.groups: "0", keys.eval_groups: "0"}

    def add_tickets(
        self,
        stream: str,
        tickets: Sequence[Ticket],
        cursor: Cursor | None = None,
        unusable: Sequence[UnusablePrompt] = (),
    ) -> None:
        """Adds the tickets whose id the ledger does not have, enters the `unusable` prompts into the ledger, and moves
        the data cursor, atomically."""
        items: list[tuple[str | bytes, ...]] = [(ticket.id, "open", "ticket", encode(ticket)) for ticket in tickets]
        items += [(one.ticket_id, one.state, "reason" * (one.state == "dead"), one.reason) for one in unusable]
        self._add(stream, cursor, items)

    def add_groups(self, groups: Sequence[tuple[str, bytes]], cursor: Cursor) -> None:
        """Adds recorded groups, pairs of ticket id and payload, as if replicas had committed them."""
        self._add(self.keys.groups, cursor, [(name, "answered", "group", payload) for name, payload in groups])

    def _add(self, stream: str, cursor: Cursor | None, items: Sequence[tuple[str | bytes, ...]]) -> None:
        position = ("", "") if cursor is None else cursor
        keys = [stream, self.keys.ledger, self.keys.cursor, self.keys.dead_letters]
        self.run_script(scripts.ADD_TICKETS, keys, [*position, *(part for item in items for part in item)])

    def requeue_dead(self, ticket: Ticket) -> bool:
        """Makes a dead ticket open again; False if it is no longer dead."""
        keys = [self.keys.ledger, self.keys.tickets, self.keys.dead_letters, self.keys.retries]
        return bool(self.run_script(scripts.REQUEUE_DEAD, keys, [ticket.id, encode(ticket)]))

    def dead_ticket(self, ticket_id: str) -> Ticket | None:
        """The dead ticket as it was; None if its payload was purged or cut."""
        (known,) = self.ledger_entries([ticket_id])
        if known is None or known.state != "dead" or not known.entry_id:
            return None
        entries: Any = self.client.xrange(self.keys.dead_letters, known.entry_id, known.entry_id)
        payload = entries[0][1].get(b"payload", b"") if entries else b""
        for decode in (decode_ticket, lambda group: decode_group(group).ticket):
            with contextlib.suppress(WireError):
                return decode(payload)
        return None

    def dead_reason(self, dead: LedgerEntry) -> str:
        """Why the ticket of that ledger entry died; empty if it was purged."""
        entries: Any = self.client.xrange(self.keys.dead_letters, dead.entry_id, dead.entry_id) if dead.entry_id else []
        return one_line(entries[0][1].get(b"reason", b"").decode(errors="replace")) if entries else ""

    def retry_requests(self) -> list[str]:
        """The dead tickets that a person asked to issue again."""
        return sorted(name.decode(errors="replace") for name in self.client.smembers(self.keys.retries))

    def settle(self, settlements: Sequence[Settlement], groups: Literal["delete", "keep"] = "delete") -> None:
        """Writes the final states into the ledger and deletes the groups. `keep`: deletes no group, and writes only
        the states that a Redis older than the checkpoint lacks."""
        keys = [self.keys.ledger, self.keys.tickets, self.keys.eval_tickets]
        for first in range(0, len(settlements), 1000):  # Lua's stack is bounded
            part = settlements[first : first + 1000]
            self.run_script(scripts.SETTLE, keys, [groups, *(field for settlement in part for field in settlement)])

    def dead_letter(self, entry: Entry, reason: str) -> bool:
        """Moves a group that cannot be used to `dead_letters`, with the reason; False if its entry is gone."""
        payload = entry.payload[:DEAD_PAYLOAD_BYTES]
        _log.error("group %s is dead: %s", entry.entry_id, reason, extra={"ticket": entry.ticket_id})
        keys = [entry.stream, self.keys.dead_letters, self.keys.ledger]
        arguments = [entry.entry_id, entry.ticket_id, reason, payload, len(entry.payload)]
        return bool(self.run_script(scripts.DEAD_LETTER, keys, arguments))

    def read(self, count: int, block_s: float) -> list[Entry]:
        """Groups and evaluation groups that this learner has not read yet; none after `block_s` seconds.

        Only the position is remembered, here: a reply that is lost, or reaches a fenced learner, loses nothing.
        """
        found: Any = self.client.xread(self._read_up_to, count=count, block=max(1, int(block_s * 1000)))
        entries = [
            Entry(stream, entry_id.decode(), _text(fields.get(b"id", b"?")), fields.get(b"group", b""))
            for stream, entry_id, fields in stream_entries(found)
        ]
        self._read_up_to |= {entry.stream: entry.entry_id for entry in entries}
        return entries

    def read_unsettled(self) -> list[Entry]:
        """All groups that are not settled, read before or not; `read` continues after them."""
        self._read_up_to = dict.fromkeys(self._read_up_to, "0")
        found: list[Entry] = []
        while entries := self.read(256, 0.0):
            found += entries
        return found

    def queue_state(self, ticket_ids: Sequence[str] = ()) -> QueueState:
        """The state of the queues and the ledger entries of `ticket_ids`, in one command."""
        keys = [self.keys.tickets, self.keys.groups, self.keys.ledger]
        open_tickets, in_stream, found = self.run_script(scripts.QUEUE_STATE, keys, list(ticket_ids))
        return QueueState(int(open_tickets), int(in_stream), _parsed(found))

    def cursor(self) -> Cursor | None:
        epoch, position = self.client.hmget(self.keys.cursor, "epoch", "place")
        return None if epoch is None or position is None else Cursor(int(epoch), int(position))

    def set_data_fingerprint(self, data: bytes, cursor: Cursor) -> None:
        """Writes the cursor, and the fingerprint of the data that it is a position in (data_fingerprint.py)."""
        fields = ("epoch", cursor.data_epoch, "place", cursor.position)
        self.execute([("HSET", self.keys.cursor, *fields, "data", data)])

    def version_steps(self) -> dict[int, int]:
        return {int(version): int(step) for version, step in self.client.hgetall(self.keys.versions).items()}

    def ledger_entries(self, ticket_ids: Sequence[str]) -> list[LedgerEntry | None]:
        """For each ticket its ledger entry; None if it was never issued."""
        found = self.client.hmget(self.keys.ledger, ticket_ids) if ticket_ids else []
        return _parsed(found)

    def unfinished(self) -> list[str]:
        """Tickets that are open or answered, in no order."""
        found = self.client.hscan_iter(self.keys.ledger, count=1000)
        return [name.decode() for name, entry in found if parse_ledger_entry(entry).state in ("open", "answered")]

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
                _log.warning("%s is not a heartbeat: %s", name.decode(errors="replace"), error)
        return found

    def desired_state(self) -> DesiredState:
        return parse_desired_state(self.client.hgetall(self.keys.control))

    def write_control(self, commands: Iterable[Command]) -> None:
        """`commands`: on the hash `control`, without its key."""
        self.execute([(verb, self.keys.control, *rest) for verb, *rest in commands])

    def advised_replicas(self) -> int | None:
        """The number of replicas that an earlier learner of this run advised last."""
        try:
            return parse_desired_replicas(_text(self.client.hget(self.keys.learner, "advised_replicas") or b""))
        except ValueError:
            return None


def _create_group(client: redis.Redis, stream: str, group: str) -> None:
    try:
        client.xgroup_create(stream, group, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def _parsed(found: Iterable[bytes | None]) -> list[LedgerEntry | None]:
    return [None if entry is None else parse_ledger_entry(entry) for entry in found]


def _text(name: bytes) -> str:
    """An id that is short and printable enough for a log line or a reply."""
    return name[:200].decode(errors="replace")
