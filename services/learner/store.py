"""The learner's side of Redis. Every write is one atomic script that checks the learner's epoch first.

A learner takes its epoch at the start; once a newer one has started, the next write of the older raises `Fenced`
and nothing of it happens. Writes may arrive twice (a retry after a lost answer) and do no harm then: a ticket id
is added once, everything else sets, deletes or acknowledges by name.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import redis

from common.keys import LEARNER_GROUP, MAX_EVENTS, TICKET_GROUP, Keys
from common.redis_client import entries_of
from common.wire import Heartbeat, Ticket, TicketState, decode_heartbeat, encode

CONSUMER = "learner"
"""Fixed, so that a restarted learner finds what it had read."""

_FENCED = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('FENCED') end\n"

_EXECUTE = (
    _FENCED
    + """
local at = 2
while at < #ARGV do
  redis.call(unpack(ARGV, at + 1, at + ARGV[at]))
  at = at + 1 + ARGV[at]
end
return 'OK'
"""
)

_ADD_TICKETS = (
    _FENCED
    + """
for i = 4, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[3], ARGV[i], 'open') == 1 then
    redis.call('XADD', KEYS[2], '*', 'id', ARGV[i], 'ticket', ARGV[i + 1])
  end
end
if ARGV[2] ~= '' then redis.call('HSET', KEYS[4], 'epoch', ARGV[2], 'place', ARGV[3]) end
return 'OK'
"""
)

Command = Sequence[str | bytes | int | float]


class Fenced(RuntimeError):
    """A newer learner of this run has started; this one must stop."""


class Cursor(NamedTuple):
    """The next prompt of the data: its place within an epoch."""

    epoch: int
    place: int


class Entry(NamedTuple):
    """One entry of `groups` or `evaluated`, read but not yet settled."""

    stream: str
    entry_id: str
    ticket_id: str
    payload: bytes


class Settlement(NamedTuple):
    """What became of a consumed group."""

    stream: str
    entry_id: str
    ticket_id: str
    state: TicketState


class LearnerStore:
    """Takes the run's next epoch and creates its streams."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self.client = client
        self.keys = keys
        for stream, group in (
            (keys.tickets, TICKET_GROUP),
            (keys.eval, TICKET_GROUP),
            (keys.groups, LEARNER_GROUP),
            (keys.evaluated, LEARNER_GROUP),
        ):
            _create_group(client, stream, group)
        self.epoch = int(client.incr(keys.epoch))
        newest: Any = client.xrevrange(keys.events, count=1)
        self._seen_event = newest[0][0].decode() if newest else "0"
        self._execute_script = client.register_script(_EXECUTE)
        self._add_tickets_script = client.register_script(_ADD_TICKETS)

    def execute(self, commands: Iterable[Command]) -> None:
        """All of `commands` atomically, or raises `Fenced`."""
        counted = [part for command in commands for part in (len(command), *command)]
        self._run(self._execute_script, [self.keys.epoch], [self.epoch, *counted])

    def add_tickets(self, stream: str, tickets: Sequence[Ticket], cursor: Cursor | None = None) -> None:
        """Adds those whose id the ledger has never seen, and moves the data cursor, in one step."""
        arguments: list[str | bytes | int] = [self.epoch, *(("", "") if cursor is None else cursor)]
        for ticket in tickets:
            arguments += [ticket.id, encode(ticket)]
        keys = [self.keys.epoch, stream, self.keys.ledger, self.keys.cursor]
        self._run(self._add_tickets_script, keys, arguments)

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Writes the final states into the ledger and deletes the groups."""
        commands: list[Command] = []
        for stream, entry_id, ticket_id, state in settlements:
            commands += [
                ("XACK", stream, LEARNER_GROUP, entry_id),
                ("XDEL", stream, entry_id),
                ("HSET", self.keys.ledger, ticket_id, state),
            ]
        if commands:
            self.execute(commands)

    def bury(self, entry: Entry, reason: str) -> None:
        """A group that cannot be used goes to `dead`, with the reason."""
        self.execute(
            [
                ("XADD", self.keys.dead, "*", "id", entry.ticket_id, "reason", reason, "payload", entry.payload),
                ("XACK", entry.stream, LEARNER_GROUP, entry.entry_id),
                ("XDEL", entry.stream, entry.entry_id),
                ("HSET", self.keys.ledger, entry.ticket_id, "dead"),
            ]
        )

    def read(self, count: int, block_s: float) -> list[Entry]:
        """New groups and evaluation groups, or none after `block_s` seconds."""
        streams = {self.keys.groups: ">", self.keys.evaluated: ">"}
        return self._entries(streams, count, max(1, int(block_s * 1000)))

    def read_pending(self) -> list[Entry]:
        """Everything that an earlier life of the learner has read and not settled."""
        found: list[Entry] = []
        for stream in (self.keys.groups, self.keys.evaluated):
            after = "0"
            while entries := self._entries({stream: after}, 256, None):
                found += entries
                after = entries[-1].entry_id
        return found

    def num_open_tickets_and_groups(self) -> tuple[int, int]:
        """Tickets not yet answered, and groups in the stream (consumed ones included), at one instant."""
        with self.client.pipeline(transaction=True) as pipe:
            open_tickets, groups = pipe.xlen(self.keys.tickets).xlen(self.keys.groups).execute()
        return int(open_tickets), int(groups)

    def cursor(self) -> Cursor | None:
        epoch, place = self.client.hmget(self.keys.cursor, "epoch", "place")
        return None if epoch is None or place is None else Cursor(int(epoch), int(place))

    def version_steps(self) -> dict[int, int]:
        return {int(version): int(step) for version, step in self.client.hgetall(self.keys.versions).items()}

    def states(self, ticket_ids: Sequence[str]) -> list[str | None]:
        found = self.client.hmget(self.keys.ledger, ticket_ids)
        return [None if state is None else state.decode() for state in found]

    def num_dead(self) -> int:
        return int(self.client.xlen(self.keys.dead))

    def replicas(self) -> list[Heartbeat]:
        """The replicas whose heartbeat has not expired."""
        names = sorted(self.client.scan_iter(match=self.keys.replicas.replace("[", "\\[") + "*", count=1000))
        payloads = self.client.mget(names) if names else []
        return [decode_heartbeat(payload) for payload in payloads if payload is not None]

    def report(self, status: dict[str, Any]) -> None:
        """Sets fields of the learner's hash, which the page and the command line show."""
        self.execute([("HSET", self.keys.learner, *_flat(status))])

    def announce(self, kind: str, event: dict[str, Any]) -> None:
        payload = msgspec.json.encode(event)
        self.execute([("XADD", self.keys.events, "MAXLEN", "~", MAX_EVENTS, "*", "kind", kind, "event", payload)])

    def take_swap_pauses_ms(self) -> list[float]:
        """How long replicas paused for weight swaps, since the last call."""
        found: Any = self.client.xrange(self.keys.events, min=f"({self._seen_event}", count=MAX_EVENTS)
        if found:
            self._seen_event = found[-1][0].decode()
        swaps = [msgspec.json.decode(fields[b"event"]) for _, fields in found if fields[b"kind"] == b"swap"]
        return [swap["pause_ms"] for swap in swaps]

    def _entries(self, streams: dict[str, str], count: int, block_ms: int | None) -> list[Entry]:
        found: Any = self.client.xreadgroup(LEARNER_GROUP, CONSUMER, streams, count=count, block=block_ms)
        return [
            Entry(
                stream, entry_id.decode(), fields.get(b"id", b"?").decode(errors="replace"), fields.get(b"group", b"")
            )
            for stream, entry_id, fields in entries_of(found)
        ]

    def _run(self, script: Any, keys: list[str], arguments: list[Any]) -> None:
        try:
            script(keys=keys, args=arguments)
        except redis.ResponseError as error:
            if "FENCED" in str(error):
                raise Fenced(f"a learner with an epoch above {self.epoch} has started") from error
            raise


def _create_group(client: redis.Redis, stream: str, group: str) -> None:
    try:
        client.xgroup_create(stream, group, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise


def _flat(fields: dict[str, Any]) -> list[str]:
    return [str(part) for pair in fields.items() for part in pair]
