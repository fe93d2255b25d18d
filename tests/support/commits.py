"""What a replica does to Redis, without a replica: leases and commits by the real script."""

from collections.abc import Callable

import redis

from headrace.common.redis.client import stream_entries
from headrace.common.redis.keys import TICKET_GROUP, Keys
from headrace.common.wire import Group, Ticket, decode_ticket, encode
from headrace.generation.tickets.scripts import MOVE


def lease_all(client: redis.Redis, keys: Keys, stream: str, count: int = 1000) -> list[tuple[str, Ticket]]:
    """Entry ids and tickets that were open in `stream`."""
    found = client.xreadgroup(TICKET_GROUP, "pretended", {stream: ">"}, count=count)
    return [(entry_id.decode(), decode_ticket(fields[b"ticket"])) for _, entry_id, fields in stream_entries(found)]


def commit(client: redis.Redis, keys: Keys, stream: str, entry_id: str, ticket_id: str, payload: bytes) -> bool:
    target = keys.eval_groups if stream == keys.eval_tickets else keys.groups
    names = (stream, target, keys.dead_letters, keys.ledger)
    (moved,) = client.eval(MOVE, 4, *names, TICKET_GROUP, "answered", entry_id, ticket_id, 2, "group", payload)
    return bool(moved)


def answer_all(client: redis.Redis, keys: Keys, stream: str, answer: Callable[[Ticket], Group]) -> list[str]:
    """Commits a group for every open ticket of the stream; returns their ids."""
    names = []
    for entry_id, ticket in lease_all(client, keys, stream):
        assert commit(client, keys, stream, entry_id, ticket.id, encode(answer(ticket)))
        names.append(ticket.id)
    return names


def bury_all(client: redis.Redis, keys: Keys, reason: str) -> list[str]:
    """Every open training ticket fails for good, as replicas write it; returns their ids."""
    names = []
    for entry_id, ticket in lease_all(client, keys, keys.tickets):
        streams = (keys.tickets, keys.dead_letters, keys.dead_letters, keys.ledger)
        fields = ("reason", reason, "payload", encode(ticket))
        assert client.eval(MOVE, 4, *streams, TICKET_GROUP, "dead", entry_id, ticket.id, 4, *fields) == [1]
        names.append(ticket.id)
    return names


def queue(client: redis.Redis, keys: Keys, ticket_id: str, payload: bytes) -> str:
    """A group in the stream with its mark in the ledger, as a commit leaves them; returns the entry's id."""
    entry_id: str = client.xadd(keys.groups, {"id": ticket_id, "group": payload}).decode()
    client.hset(keys.ledger, ticket_id, f"answered {entry_id}")
    return entry_id
