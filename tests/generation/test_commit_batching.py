"""Commits that are due at the same time go into one script, each exactly once, even if some are cancelled or lost."""

import asyncio

import pytest
import redis

from headrace.common.redis.client import connect_async
from headrace.common.redis.keys import Keys
from headrace.common.wire import decode_group
from headrace.common.wire.ledger import parse_ledger_entry
from headrace.generation.tickets.commit_batching import MAX_BATCH_BYTES, MAX_BATCH_ITEMS, Batcher
from headrace.generation.tickets.store import TicketStore
from headrace.learner.store.store import LearnerStore
from tests.generation.test_tickets import as_replica
from tests.support.factories import make_group, make_ticket


class Sender:
    """Answers even numbers with True, once `may_answer` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.num_on_their_way = self.num_cancelled = 0
        self.may_answer = asyncio.Event()

    async def __call__(self, items: list[int]) -> list[bool]:
        self.batches.append(list(items))
        self.num_on_their_way += 1
        assert self.num_on_their_way == 1, "one round trip at a time"
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_on_their_way -= 1
        if -1 in items:
            raise redis.ConnectionError("away")
        return [item % 2 == 0 for item in items]


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_commits_that_arrive_during_a_call_form_the_next_batch() -> None:
    async def run() -> None:
        sender = Sender()
        batcher = Batcher[int](sender)
        first = asyncio.create_task(batcher.add(0, 1))
        await turns()
        later = [asyncio.create_task(batcher.add(item, 1)) for item in (1, 2, 3)]
        await turns()
        assert sender.batches == [[0]], "the first one does not wait for others"
        sender.may_answer.set()
        assert await first is True
        assert [await one for one in later] == [False, True, False]
        assert sender.batches == [[0], [1, 2, 3]]

    asyncio.run(run())


def test_a_batch_is_bounded() -> None:
    async def run() -> None:
        sender = Sender()
        sender.may_answer.set()
        batcher = Batcher[int](sender)
        count = MAX_BATCH_ITEMS + 3
        await asyncio.gather(*(batcher.add(item, 1) for item in range(count)))
        await asyncio.gather(*(batcher.add(item, MAX_BATCH_BYTES // 2) for item in range(3)))
        assert [len(batch) for batch in sender.batches] == [MAX_BATCH_ITEMS, 3, 2, 1]

    asyncio.run(run())


def test_a_cancelled_commit_does_not_affect_others_and_the_last_one_cancels_the_call() -> None:
    async def run() -> None:
        sender = Sender()
        batcher = Batcher[int](sender)
        on_its_way = [asyncio.create_task(batcher.add(item, 1)) for item in (0, 2)]
        await turns()
        waiting = asyncio.create_task(batcher.add(4, 1))
        await turns()
        on_its_way[0].cancel()
        waiting.cancel()
        await turns()
        assert (sender.num_on_their_way, sender.num_cancelled) == (1, 0)
        on_its_way[1].cancel()
        await turns()
        assert (sender.num_on_their_way, sender.num_cancelled) == (0, 1)
        sender.may_answer.set()
        assert await batcher.add(6, 1) is True
        assert sender.batches == [[0, 2], [6]], "a commit that only waited is not sent"

    asyncio.run(run())


def test_an_error_is_raised_for_every_commit_of_the_batch_only() -> None:
    async def run() -> None:
        sender = Sender()
        batcher = Batcher[int](sender)
        failing = [asyncio.create_task(batcher.add(item, 1)) for item in (-1, 2)]
        await turns()
        next_one = asyncio.create_task(batcher.add(4, 1))
        sender.may_answer.set()
        for one in failing:
            with pytest.raises(redis.ConnectionError):
                await one
        assert await next_one is True

    asyncio.run(run())


def test_commits_in_one_script_are_independent(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    """One ticket was claimed by another replica, one is unknown to the ledger, one was committed before."""
    learner = LearnerStore(client, keys)
    learner.add_tickets(keys.tickets, [make_ticket(f"0-{place}") for place in range(5)])

    async def commit(store: TicketStore) -> list[bool]:
        leases = await store.lease(keys.tickets, 5, 1.0)
        assert await store.commit(leases[0], make_group("0-0"))
        client.xack(keys.tickets, "generation", leases[1].entry_id)
        client.hdel(keys.ledger, "0-2")
        before = client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
        found = await asyncio.gather(
            *(
                store.commit(lease, make_group(lease.ticket.id, rewards=(float(place), 9.0)))
                for place, lease in enumerate(leases)
            )
        )
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1
        assert store.outcomes == {"committed": 3, "duplicate": 3}
        return found

    assert as_replica(redis_url, keys, "a", commit) == [False, False, False, True, True]
    groups = {fields[b"id"]: decode_group(fields[b"group"]) for _, fields in client.xrange(keys.groups)}
    assert {name: group.rewards[0] for name, group in groups.items()} == {b"0-0": 1.0, b"0-3": 3.0, b"0-4": 4.0}
    assert [fields[b"id"] for _, fields in client.xrange(keys.dead_letters)] == [b"0-2"]
    marks = client.hgetall(keys.ledger)
    assert {name: parse_ledger_entry(mark).state for name, mark in marks.items()} == {
        b"0-0": "answered", b"0-1": "open", b"0-3": "answered", b"0-4": "answered"
    }  # fmt: skip


def test_a_full_redis_accepts_all_of_a_batch_or_none(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    LearnerStore(client, keys).add_tickets(keys.tickets, [make_ticket(f"0-{place}") for place in range(3)])

    async def commit() -> list[bool]:
        replica = connect_async(redis_url)
        store = TicketStore(replica, keys, "a")
        leases = await store.lease(keys.tickets, 3, 1.0)
        client.config_set("maxmemory", 1)
        try:
            commits = [asyncio.create_task(store.commit(lease, make_group(lease.ticket.id))) for lease in leases]
            await asyncio.sleep(0.5)
            assert client.xlen(keys.groups) == 0 and client.xlen(keys.tickets) == 3
        finally:
            client.config_set("maxmemory", 0)
        found = await asyncio.gather(*commits)
        await replica.aclose()
        return found

    assert asyncio.run(commit()) == [True, True, True]
    assert (client.xlen(keys.groups), client.xlen(keys.tickets)) == (3, 0)
