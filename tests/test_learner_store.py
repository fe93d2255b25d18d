"""The learner's writes to a real Redis: fenced, idempotent, settled in order."""

import pytest
import redis

from common.keys import Keys
from common.redis_client import durability_problem
from services.learner.store import Cursor, Entry, Fenced, LearnerStore, Settlement
from tests.making import make_ticket


def test_a_newer_learner_fences_the_older_one_off(client: redis.Redis, keys: Keys) -> None:
    older = LearnerStore(client, keys)
    newer = LearnerStore(client, keys)
    assert newer.epoch == older.epoch + 1
    with pytest.raises(Fenced, match=f"above {older.epoch}"):
        older.add_tickets(keys.tickets, [make_ticket()])
    with pytest.raises(Fenced):
        older.report({"phase": "training"})
    with pytest.raises(Fenced):
        older.settle([Settlement(keys.groups, "1-1", "0-0", "trained")])
    assert not client.exists(keys.learner) and not client.exists(keys.ledger)
    newer.report({"phase": "training"})
    assert client.hget(keys.learner, "phase") == b"training"


def test_a_ticket_is_added_once_and_the_cursor_moves_with_it(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    assert store.cursor() is None
    tickets = [make_ticket("0-0"), make_ticket("0-1")]
    store.add_tickets(keys.tickets, tickets, Cursor(0, 2))
    store.add_tickets(keys.tickets, tickets, Cursor(0, 2))
    assert client.xlen(keys.tickets) == 2
    assert store.cursor() == Cursor(0, 2)
    store.add_tickets(keys.eval, [make_ticket("eval-0-0", kind="eval")])
    assert store.cursor() == Cursor(0, 2)


def test_what_was_read_and_not_settled_is_found_again(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    for index in range(3):
        client.xadd(keys.groups, {"id": f"0-{index}", "group": f"payload {index}"})
    client.xadd(keys.evaluated, {"id": "eval-0-0", "group": "e"})
    entries = store.read(10, 0.1)
    assert sorted(entry.ticket_id for entry in entries) == ["0-0", "0-1", "0-2", "eval-0-0"]
    assert store.read(10, 0.01) == []
    first = next(entry for entry in entries if entry.ticket_id == "0-0")
    store.settle([Settlement(first.stream, first.entry_id, "0-0", "trained")])

    again = LearnerStore(client, keys)
    assert sorted(entry.ticket_id for entry in again.read_pending()) == ["0-1", "0-2", "eval-0-0"]
    assert again.num_open_tickets_and_groups() == (0, 2)
    assert again.states(["0-0", "0-1"]) == ["trained", None]


def test_a_group_that_cannot_be_used_is_buried_with_the_reason(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    entry_id = client.xadd(keys.groups, {"id": "0-0", "group": b"\xff\x00"}).decode()
    store.read(10, 0.1)
    store.bury(Entry(keys.groups, entry_id, "0-0", b"\xff\x00"), "cannot decode")
    ((_, fields),) = client.xrange(keys.dead)
    assert fields == {b"id": b"0-0", b"reason": b"cannot decode", b"payload": b"\xff\x00"}
    assert (client.xlen(keys.groups), store.num_dead(), store.states(["0-0"])) == (0, 1, ["dead"])


def test_swap_pauses_are_taken_once_and_only_from_now_on(client: redis.Redis, keys: Keys) -> None:
    client.xadd(keys.events, {"kind": "swap", "event": '{"pause_ms": 1.0}'})
    store = LearnerStore(client, keys)
    client.xadd(keys.events, {"kind": "swap", "event": '{"pause_ms": 2.5}'})
    client.xadd(keys.events, {"kind": "step", "event": "{}"})
    assert store.take_swap_pauses_ms() == [2.5]
    assert store.take_swap_pauses_ms() == []


def test_a_redis_that_may_lose_writes_is_named(client: redis.Redis) -> None:
    assert durability_problem(client) is None
    client.config_set("appendfsync", "everysec")
    try:
        assert durability_problem(client) == "appendfsync is 'everysec', expected 'always'"
    finally:
        client.config_set("appendfsync", "always")


@pytest.mark.parametrize("run", ["", "a b", "{x}", "../x", "x" * 65, "-x"])
def test_a_run_name_is_one_hash_slot_and_one_folder(run: str) -> None:
    with pytest.raises(ValueError, match="run '"):
        Keys(run)
