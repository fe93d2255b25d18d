"""A replica's side of Redis: leases on tickets, their commits and failures, the heartbeat, events.

A ticket leaves its stream by one script, `MOVE`. It acts only if the entry is still pending: it adds the outcome to the
target stream, then acknowledges and deletes the ticket and updates the ledger, in one step. So a group is committed
exactly once, however many replicas answered the ticket, and a full Redis refuses the group before the ticket is
deleted. One call may move several tickets, each independently: commits that are due at the same time. An entry that
the ledger does not point to is not an open ticket and goes to the dead letters. After a Redis has lost all its data,
old leases are dropped and the streams are created again.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import redis
import redis.asyncio

from headrace.common.redis.client import stream_entries
from headrace.common.redis.keys import MAX_EVENTS, TICKET_GROUP, Keys
from headrace.common.wire import Group, Heartbeat, Ticket, TicketState, WireError, decode_ticket, encode
from headrace.generation.tickets.commit_batching import Batcher
from headrace.generation.tickets.scripts import MOVE, RENEW

MAX_INTERRUPTIONS = 10
MAX_DEAD_COMPLETIONS = 4
MAX_DEAD_CHARS = 4000
"""Longest text kept of each completion of a dead letter."""
_log = logging.getLogger(__name__)


def truncate(text: str) -> str:
    """Keeps the beginning and the end, `MAX_DEAD_CHARS` in all; lone surrogates are escaped."""
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= MAX_DEAD_CHARS:
        return text
    half = MAX_DEAD_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


class Lease(NamedTuple):
    """A ticket that this replica processes until it is committed, failed or handed back."""

    stream: str
    entry_id: str
    ticket: Ticket
    num_deliveries: int = 1


class Move(NamedTuple):
    """A ticket that leaves its stream, and the fields of the entry that replaces it."""

    entry_id: str
    ticket_id: str
    fields: dict[str, str | bytes]


class TicketStore:
    """Reads and writes tickets for one replica. Every call is safe to repeat."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, replica: str) -> None:
        self.client = client
        self.keys = keys
        self.replica = replica
        self.outcomes: Counter[str] = Counter()
        """Number of leases by outcome: committed, duplicate (another replica's group was first), failed, dead,
        handed_back, interrupted."""
        self._move_script = client.register_script(MOVE)
        self._renew_script = client.register_script(RENEW)
        self._commits = {
            keys.tickets: Batcher[Move](lambda moves: self._move(keys.tickets, keys.groups, "answered", moves)),
            keys.eval_tickets: Batcher[Move](
                lambda moves: self._move(keys.eval_tickets, keys.eval_groups, "answered", moves)
            ),
        }

    async def open(self) -> None:
        """Creates the streams and loads the script; without the load the first commits would be sent twice."""
        await self.client.script_load(MOVE)
        for stream in (self.keys.tickets, self.keys.eval_tickets):
            try:
                await self.client.xgroup_create(stream, TICKET_GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def lease(self, stream: str, count: int, block_s: float) -> list[Lease]:
        """Leases up to `count` open tickets; returns an empty list if none comes within `block_s` seconds."""
        try:
            found: Any = await self.client.xreadgroup(
                TICKET_GROUP, self.replica, {stream: ">"}, count=count, block=max(1, int(block_s * 1000))
            )
        except redis.ResponseError as error:
            await self._recreate_streams(error)
            return []
        return await self._leases(stream, [(entry_id, fields) for _, entry_id, fields in stream_entries(found)])

    async def claim(self, stream: str, count: int, idle_s: float) -> list[Lease]:
        """Takes over up to `count` tickets whose leases have not been renewed for `idle_s` seconds."""
        try:
            _, rows, *_ = await self.client.xautoclaim(
                stream, TICKET_GROUP, self.replica, min_idle_time=int(idle_s * 1000), start_id="0-0", count=count
            )
        except redis.ResponseError as error:
            await self._recreate_streams(error)
            return []
        leases = await self._leases(stream, rows)
        return [lease._replace(num_deliveries=await self._num_deliveries(lease)) for lease in leases]

    async def renew(self, leases: Sequence[Lease]) -> None:
        """Resets the idle time of the leases that this replica still holds."""
        for stream in {lease.stream for lease in leases}:
            entry_ids = [lease.entry_id for lease in leases if lease.stream == stream]
            try:
                await self._renew_script(keys=[stream], args=[TICKET_GROUP, self.replica, *entry_ids])
            except redis.ResponseError as error:
                await self._recreate_streams(error)

    async def commit(self, lease: Lease, group: Group) -> bool:
        """Adds the group and deletes its ticket; returns False if another replica has claimed or answered it."""
        payload = encode(group)
        move = Move(lease.entry_id, lease.ticket.id, {"group": payload})
        is_first = await self._commits[lease.stream].add(move, len(payload))
        self.outcomes["committed" if is_first else "duplicate"] += 1
        return is_first

    async def fail(self, lease: Lease, reason: str, max_attempts: int, completions: Sequence[str] = ()) -> None:
        """Counts an attempt: the ticket goes back to its stream, or to the dead letters after `max_attempts`.

        `completions`: the completions that failed, for people to read. A dead letter has the first
        `MAX_DEAD_COMPLETIONS`, each truncated.
        """
        ticket = msgspec.structs.replace(
            lease.ticket,
            attempts=max(lease.ticket.attempts + 1, lease.num_deliveries),
            avoid=sorted({*lease.ticket.avoid, self.replica}),
        )
        _log.warning("attempt %d of %d failed: %s", ticket.attempts, max_attempts, reason, extra={"ticket": ticket.id})
        if ticket.attempts >= max_attempts:
            kept = [truncate(completion) for completion in completions[:MAX_DEAD_COMPLETIONS]]
            await self._dead_letter(lease.stream, lease.entry_id, ticket.id, reason, encode(ticket), kept)
        else:
            await self._reopen(lease, ticket, "failed")

    async def hand_back(self, lease: Lease) -> None:
        """Puts the ticket back, unchanged, at the end of its stream; no attempt is counted."""
        _log.info("handed back", extra={"ticket": lease.ticket.id})
        await self._reopen(lease, lease.ticket, "handed_back")

    async def requeue_interrupted(self, lease: Lease, reason: str) -> None:
        """Hands the ticket back and counts an interruption; `MAX_INTERRUPTIONS` make it a dead letter.

        Otherwise a ticket that crashes every engine would be retried for ever.
        """
        ticket = msgspec.structs.replace(lease.ticket, interruptions=lease.ticket.interruptions + 1)
        _log.warning("interruption %d: %s", ticket.interruptions, reason, extra={"ticket": ticket.id})
        if ticket.interruptions >= MAX_INTERRUPTIONS:
            reason = f"interrupted {ticket.interruptions} times: {reason}"
            await self._dead_letter(lease.stream, lease.entry_id, ticket.id, reason, encode(ticket))
        else:
            await self._reopen(lease, ticket, "interrupted")

    async def write_heartbeat(self, heartbeat: Heartbeat, ttl_s: float) -> None:
        await self.client.set(self.keys.replica(self.replica), encode(heartbeat), px=int(ttl_s * 1000))

    async def delete_heartbeat(self) -> None:
        await self.client.delete(self.keys.replica(self.replica))

    async def announce(self, kind: str, event: dict[str, Any]) -> None:
        fields: Any = {"kind": kind, "event": msgspec.json.encode(event)}
        await self.client.xadd(self.keys.events, fields, maxlen=MAX_EVENTS)

    async def _recreate_streams(self, error: redis.ResponseError) -> None:
        """Creates the streams if `error` says that Redis has lost them; raises any other error."""
        if not str(error).startswith("NOGROUP"):
            raise error
        _log.warning("Redis has lost the run's streams; creating them again")
        await self.open()

    async def _leases(self, stream: str, rows: Any) -> list[Lease]:
        leases = []
        for entry_id, fields in rows:
            if not fields:  # the ticket was deleted while pending
                continue
            try:
                leases.append(Lease(stream, entry_id.decode(), decode_ticket(fields[b"ticket"])))
            except (KeyError, WireError) as error:
                name = fields.get(b"id", b"?").decode(errors="replace")
                await self._dead_letter(stream, entry_id.decode(), name, f"undecodable ticket: {error}", b"")
        return leases

    async def _num_deliveries(self, lease: Lease) -> int:
        pending = await self.client.xpending_range(lease.stream, TICKET_GROUP, lease.entry_id, lease.entry_id, 1)
        return int(pending[0]["times_delivered"]) if pending else 1

    async def _reopen(self, lease: Lease, ticket: Ticket, outcome: str) -> None:
        move = Move(lease.entry_id, ticket.id, {"ticket": encode(ticket)})
        (moved,) = await self._move(lease.stream, lease.stream, "open", [move])
        self.outcomes[outcome] += moved

    async def _dead_letter(
        self, stream: str, entry_id: str, ticket_id: str, reason: str, payload: bytes, completions: Sequence[str] = ()
    ) -> None:
        _log.error("dead: %s", reason, extra={"ticket": ticket_id})
        fields: dict[str, str | bytes] = {"reason": reason, "payload": payload}
        if completions:
            fields["completions"] = msgspec.json.encode(completions)
        move = Move(entry_id, ticket_id, fields)
        (moved,) = await self._move(stream, self.keys.dead_letters, "dead", [move])
        self.outcomes["dead"] += moved

    async def _move(self, source: str, target: str, state: TicketState, moves: Sequence[Move]) -> list[bool]:
        keys = [source, target, self.keys.dead_letters, self.keys.ledger]
        arguments: list[str | bytes | int] = [TICKET_GROUP, state]
        for entry_id, ticket_id, fields in moves:
            arguments += [entry_id, ticket_id, 2 * len(fields), *(part for pair in fields.items() for part in pair)]
        try:
            moved = await self._move_script(keys=keys, args=arguments)
        except redis.ResponseError as error:
            await self._recreate_streams(error)
            return [False] * len(moves)
        return [bool(one) for one in moved]
