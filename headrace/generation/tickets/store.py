"""A replica's side of Redis: leases on tickets, and the one script by which a ticket leaves its stream.

`MOVE` acts only if the entry is still pending: it adds the outcome to the target stream, then acknowledges and
deletes the ticket and marks it in the ledger, all at once. So a group is committed exactly once, however many
replicas answered the ticket, and a Redis that is full refuses the group before the ticket is gone. One call may move
several tickets, each for itself: commits that are due at the same time. An entry that the ledger does not point to is
nobody's ticket and goes to `dead`. A Redis that has lost everything has no tickets either:
what was leased from it is forgotten, and the streams are created anew.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import redis
import redis.asyncio

from headrace.common.redis.client import entries_of
from headrace.common.redis.keys import MAX_EVENTS, TICKET_GROUP, Keys
from headrace.common.wire import Group, Heartbeat, Ticket, TicketState, WireError, decode_ticket, encode
from headrace.generation.tickets.commit_batching import Batcher

MAX_INTERRUPTIONS = 10
MAX_DEAD_COMPLETIONS = 4
MAX_DEAD_CHARS = 4000
"""Of each completion that is kept with a dead ticket."""
_log = logging.getLogger(__name__)

MOVE = """#!lua
local moved = {}
local at = 3
while at < #ARGV do
  local entry, id, last = ARGV[at], ARGV[at + 1], at + 2 + ARGV[at + 2]
  local is_ours = false
  if #redis.call('XPENDING', KEYS[1], ARGV[1], entry, entry, 1) > 0 then
    is_ours = redis.call('HGET', KEYS[4], id) == 'open ' .. entry
    if is_ours then
      local added = redis.call('XADD', KEYS[2], '*', 'id', id, unpack(ARGV, at + 3, last))
      redis.call('HSET', KEYS[4], id, ARGV[2] .. ' ' .. added)
    else
      redis.call('XADD', KEYS[3], '*', 'id', id, 'reason', 'the ledger knows no such open ticket')
    end
    redis.call('XACK', KEYS[1], ARGV[1], entry)
    redis.call('XDEL', KEYS[1], entry)
  end
  moved[#moved + 1] = is_ours and 1 or 0
  at = last + 1
end
return moved
"""
"""KEYS: source, target, dead, ledger. ARGV: consumer group, the state from now on; then of each ticket its entry, its
id, how many parts its fields have, and these. Answers for each whether it was moved."""

_RENEW = """
local renewed = 0
for i = 3, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    renewed = renewed + 1
  end
end
return renewed
"""


def truncate(text: str) -> str:
    """To `MAX_DEAD_CHARS`, its end included; what no encoding takes is written out."""
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= MAX_DEAD_CHARS:
        return text
    half = MAX_DEAD_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"


class Lease(NamedTuple):
    """A ticket that this replica works on until it commits, fails or hands it back."""

    stream: str
    entry_id: str
    ticket: Ticket
    num_deliveries: int = 1


class Move(NamedTuple):
    """A ticket that leaves its stream, and the fields of what takes its place."""

    entry_id: str
    ticket_id: str
    fields: dict[str, str | bytes]


class TicketStore:
    """Every call is safe to repeat."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys, replica: str) -> None:
        self.client = client
        self.keys = keys
        self.replica = replica
        self.outcomes: Counter[str] = Counter()
        """Of leases: committed, late (another replica's group was there first), failed, dead, handed_back,
        interrupted."""
        self._move_script = client.register_script(MOVE)
        self._renew_script = client.register_script(_RENEW)
        self._commits = {
            keys.tickets: Batcher[Move](lambda moves: self._move(keys.tickets, keys.groups, "queued", moves)),
            keys.eval: Batcher[Move](lambda moves: self._move(keys.eval, keys.evaluated, "queued", moves)),
        }

    async def open(self) -> None:
        """Creates the streams, and hands Redis the script: the first commits would be sent twice otherwise."""
        await self.client.script_load(MOVE)
        for stream in (self.keys.tickets, self.keys.eval):
            try:
                await self.client.xgroup_create(stream, TICKET_GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    async def lease(self, stream: str, count: int, block_s: float) -> list[Lease]:
        """Up to `count` open tickets; none after `block_s` seconds without any."""
        try:
            found: Any = await self.client.xreadgroup(
                TICKET_GROUP, self.replica, {stream: ">"}, count=count, block=max(1, int(block_s * 1000))
            )
        except redis.ResponseError as error:
            await self._recreate_streams(error)
            return []
        return await self._leases(stream, [(entry_id, fields) for _, entry_id, fields in entries_of(found)])

    async def claim(self, stream: str, count: int, idle_s: float) -> list[Lease]:
        """Up to `count` tickets whose replica has been silent for `idle_s` seconds."""
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
        """Resets the idle time of those that are still ours."""
        for stream in {lease.stream for lease in leases}:
            entry_ids = [lease.entry_id for lease in leases if lease.stream == stream]
            try:
                await self._renew_script(keys=[stream], args=[TICKET_GROUP, self.replica, *entry_ids])
            except redis.ResponseError as error:
                await self._recreate_streams(error)

    async def commit(self, lease: Lease, group: Group) -> bool:
        """Adds the group and retires its ticket; False if somebody else already has."""
        payload = encode(group)
        move = Move(lease.entry_id, lease.ticket.id, {"group": payload})
        is_first = await self._commits[lease.stream].add(move, len(payload))
        self.outcomes["committed" if is_first else "late"] += 1
        return is_first

    async def fail(self, lease: Lease, reason: str, max_attempts: int, completions: Sequence[str] = ()) -> None:
        """One attempt more: the ticket goes back to its stream, or to `dead` after the last.

        `completions`: what it failed by, for people to read; the first few are kept in `dead`, each to a bound.
        """
        ticket = msgspec.structs.replace(
            lease.ticket,
            attempts=max(lease.ticket.attempts + 1, lease.num_deliveries),
            avoid=sorted({*lease.ticket.avoid, self.replica}),
        )
        told = ticket.attempts, max_attempts, reason
        _log.warning("attempt %d of %d failed: %s", *told, extra={"ticket": ticket.id})
        if ticket.attempts >= max_attempts:
            shown = [truncate(completion) for completion in completions[:MAX_DEAD_COMPLETIONS]]
            await self._dead_letter(lease.stream, lease.entry_id, ticket.id, reason, encode(ticket), shown)
        else:
            await self._reopen(lease, ticket, "failed")

    async def hand_back(self, lease: Lease) -> None:
        """Not an attempt: the ticket is as it was, at the end of its stream."""
        _log.info("handed back", extra={"ticket": lease.ticket.id})
        await self._reopen(lease, lease.ticket, "handed_back")

    async def requeue_interrupted(self, lease: Lease, reason: str) -> None:
        """As a hand-back, but a ticket that is in the engine whenever one goes down is dead in the end."""
        ticket = msgspec.structs.replace(lease.ticket, interruptions=lease.ticket.interruptions + 1)
        _log.warning("interrupted for the %d. time: %s", ticket.interruptions, reason, extra={"ticket": ticket.id})
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
        """After a Redis that lost its streams; raises any other error again."""
        if not str(error).startswith("NOGROUP"):
            raise error
        _log.warning("Redis has lost the run's streams, creating them again")
        await self.open()

    async def _leases(self, stream: str, rows: Any) -> list[Lease]:
        leases = []
        for entry_id, fields in rows:
            if not fields:  # deleted while pending: nothing is left to answer
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
        (moved,) = await self._move(stream, self.keys.dead, "dead", [move])
        self.outcomes["dead"] += moved

    async def _move(self, source: str, target: str, state: TicketState, moves: Sequence[Move]) -> list[bool]:
        keys = [source, target, self.keys.dead, self.keys.ledger]
        arguments: list[str | bytes | int] = [TICKET_GROUP, state]
        for entry_id, ticket_id, fields in moves:
            arguments += [entry_id, ticket_id, 2 * len(fields), *(part for pair in fields.items() for part in pair)]
        try:
            moved = await self._move_script(keys=keys, args=arguments)
        except redis.ResponseError as error:
            await self._recreate_streams(error)
            return [False] * len(moves)
        return [bool(one) for one in moved]
