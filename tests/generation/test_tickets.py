"""Tickets in a real Redis: leased, committed once, retried, dead-lettered, handed back, claimed."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import redis

from headrace.common.redis.client import connect_async
from headrace.common.redis.keys import Keys
from headrace.common.wire import decode_group, decode_ticket, encode
from headrace.common.wire.ledger import parse_ledger_entry
from headrace.generation.tickets.store import (
    MAX_DEAD_CHARS,
    MAX_DEAD_COMPLETIONS,
    MAX_INTERRUPTIONS,
    Lease,
    TicketStore,
)
from headrace.learner.commands.dead_letters import dead_letters, kept_payload
from headrace.learner.store.store import LearnerStore
from tests.support.factories import make_group, make_ticket
from tests.support.guard import GUARD_S

T = TypeVar("T")
Replica = Callable[[TicketStore], Awaitable[T]]


def as_replica(url: str, keys: Keys, name: str, act: Replica[T], deadline_s: float = GUARD_S) -> T:
    async def run() -> T:
        client = connect_async(url, deadline_s=deadline_s)
        try:
            store = TicketStore(client, keys, name)
            await store.open()
            return await act(store)
        finally:
            await client.aclose()

    return asyncio.run(run())


def states(client: redis.Redis, keys: Keys) -> dict[str, str]:
    return {name.decode(): parse_ledger_entry(mark).state for name, mark in client.hgetall(keys.ledger).items()}


async def lease_one(store: TicketStore) -> Lease:
    (lease,) = await store.lease(store.keys.tickets, 1, 1.0)
    return lease


def test_a_ticket_becomes_one_group(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    learner = LearnerStore(client, keys)
    learner.add_tickets(keys.tickets, [make_ticket()])
    assert states(client, keys) == {"0-0": "open"}

    async def answer(store: TicketStore) -> tuple[bool, bool]:
        lease = await lease_one(store)
        assert lease.ticket == make_ticket()
        return await store.commit(lease, make_group()), await store.commit(lease, make_group())

    assert as_replica(redis_url, keys, "a", answer) == (True, False)
    assert states(client, keys) == {"0-0": "answered"}
    assert learner.queue_state()[:2] == (0, 1)
    (entry,) = learner.read(10, 0.1)
    assert entry.ticket_id == "0-0"
    assert decode_group(entry.payload).rewards == [1.0, 0.0]


def test_a_late_duplicate_answer_is_not_committed(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    """Replica a falls silent, b claims and commits the ticket; then a wakes up and commits it, too."""
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])
    lease = as_replica(redis_url, keys, "a", lease_one)

    async def claim_and_commit(store: TicketStore) -> bool:
        (claimed,) = await store.claim(store.keys.tickets, 5, idle_s=0.0)
        assert claimed.num_deliveries == 2
        return await store.commit(claimed, make_group())

    assert as_replica(redis_url, keys, "b", claim_and_commit)
    assert not as_replica(redis_url, keys, "a", lambda store: store.commit(lease, make_group()))
    assert client.xlen(keys.groups) == 1


def test_a_renewed_lease_is_not_claimed_and_a_lost_one_not_taken_back(
    redis_url: str, client: redis.Redis, keys: Keys
) -> None:
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])
    lease = as_replica(redis_url, keys, "a", lease_one)
    client.xclaim(keys.tickets, "generation", "a", 0, [lease.entry_id], idle=60_000, justid=True)
    as_replica(redis_url, keys, "a", lambda store: store.renew([lease]))

    async def claim(store: TicketStore) -> list[Lease]:
        return await store.claim(store.keys.tickets, 5, idle_s=30.0)

    assert as_replica(redis_url, keys, "b", claim) == []
    client.xclaim(keys.tickets, "generation", "b", 0, [lease.entry_id], idle=60_000, justid=True)
    as_replica(redis_url, keys, "a", lambda store: store.renew([lease]))
    (taken,) = as_replica(redis_url, keys, "c", claim)
    assert taken.ticket.id == "0-0"


def test_a_failure_is_retried_and_then_dead_with_its_reason(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])

    async def fail(store: TicketStore) -> None:
        await store.fail(await lease_one(store), "reward: boom", 2, ["\x1b\ud800", "9" * 10_000, *"abcdef"])

    as_replica(redis_url, keys, "a", fail)
    assert states(client, keys) == {"0-0": "open"}
    ((_, fields),) = client.xrange(keys.tickets)
    retried = decode_ticket(fields[b"ticket"])
    assert (retried.attempts, retried.avoid) == (1, ["a"])
    as_replica(redis_url, keys, "b", fail)
    assert states(client, keys) == {"0-0": "dead"}
    assert client.xlen(keys.tickets) == 0
    ((_, dead),) = client.xrange(keys.dead_letters)
    assert (dead[b"id"], dead[b"reason"]) == (b"0-0", b"reward: boom")
    (found,) = dead_letters(client, keys)
    kept = kept_payload(client, keys, found.entry_id)
    assert (kept.messages, kept.reference, kept.attempts) == (make_ticket().messages, {"answer": "2"}, 2)
    assert len(kept.completions) == MAX_DEAD_COMPLETIONS and kept.completions[0] == "\x1b\\ud800"
    assert "6,000 characters" in kept.completions[1] and len(kept.completions[1]) < MAX_DEAD_CHARS + 50


def test_a_hand_back_does_not_count_as_an_attempt(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])

    async def hand_back(store: TicketStore) -> None:
        await store.hand_back(await lease_one(store))

    as_replica(redis_url, keys, "a", hand_back)
    assert as_replica(redis_url, keys, "b", lease_one).ticket == make_ticket()


def test_a_ticket_interrupted_too_often_becomes_a_dead_letter(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])

    async def interrupt(store: TicketStore) -> None:
        for num_before in range(MAX_INTERRUPTIONS):
            lease = await lease_one(store)
            assert (lease.ticket.interruptions, lease.ticket.attempts, lease.ticket.avoid) == (num_before, 0, [])
            await store.requeue_interrupted(lease, "the engine exited with -9")

    as_replica(redis_url, keys, "a", interrupt)
    ((_, dead),) = client.xrange(keys.dead_letters)
    assert dead[b"reason"] == b"interrupted 10 times: the engine exited with -9"
    assert states(client, keys) == {"0-0": "dead"} and client.xlen(keys.tickets) == 0


def test_an_undecodable_ticket_becomes_a_dead_letter(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket("0-1")])
    entry_id = client.xadd(keys.tickets, {"id": "0-0", "ticket": b"garbage"}).decode()
    client.hset(keys.ledger, "0-0", f"open {entry_id}")

    async def lease(store: TicketStore) -> list[Lease]:
        return await store.lease(store.keys.tickets, 10, 0.5)

    assert [found.ticket.id for found in as_replica(redis_url, keys, "a", lease)] == ["0-1"]
    assert states(client, keys)["0-0"] == "dead"


def test_an_entry_that_the_ledger_does_not_know_becomes_a_dead_letter(
    redis_url: str, client: redis.Redis, keys: Keys
) -> None:
    """A duplicate of a ticket is never answered twice, and an invented one never."""
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket("0-1")])
    ((_, fields),) = client.xrange(keys.tickets)
    client.xadd(keys.tickets, fields)
    client.xadd(keys.tickets, {"id": "0-9", "ticket": encode(make_ticket("0-9"))})

    async def answer(store: TicketStore) -> list[bool]:
        leases = await store.lease(store.keys.tickets, 10, 0.5)
        return [await store.commit(lease, make_group(lease.ticket.id)) for lease in leases]

    assert as_replica(redis_url, keys, "a", answer) == [True, False, False]
    assert (client.xlen(keys.groups), client.xlen(keys.tickets), client.xlen(keys.dead_letters)) == (1, 0, 2)
    assert states(client, keys) == {"0-1": "answered"}


def test_after_a_loss_of_data_leases_are_dropped_and_streams_created_again(
    redis_url: str, client: redis.Redis, keys: Keys
) -> None:
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])

    async def lose(store: TicketStore) -> list[Lease]:
        lease = await lease_one(store)
        client.delete(keys.tickets, keys.eval_tickets, keys.ledger)
        assert not await store.commit(lease, make_group())
        client.delete(keys.tickets)
        await store.renew([lease])
        client.delete(keys.tickets)
        assert await store.claim(store.keys.tickets, 5, idle_s=0.0) == []
        client.delete(keys.tickets)
        assert await store.lease(store.keys.tickets, 1, 0.01) == []
        LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])
        return await store.lease(store.keys.tickets, 1, 1.0)

    assert [lease.ticket.id for lease in as_replica(redis_url, keys, "a", lose)] == ["0-0"]


def test_a_redis_that_is_full_keeps_the_ticket(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    """The commit adds the group before it acknowledges the ticket, so a refused group leaves its ticket pending."""
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])
    lease = as_replica(redis_url, keys, "a", lease_one)
    client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis.OutOfMemoryError):
            as_replica(redis_url, keys, "a", lambda store: store.commit(lease, make_group()), deadline_s=0.1)
    finally:
        client.config_set("maxmemory", "0")
    assert client.xlen(keys.tickets) == 1
    assert as_replica(redis_url, keys, "a", lambda store: store.commit(lease, make_group()))


def test_payloads_are_msgpack(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket()])
    ((_, fields),) = client.xrange(keys.tickets)
    assert fields == {b"id": b"0-0", b"ticket": encode(make_ticket())}
