"""The learner's writes to a real Redis: fenced, idempotent, settled in order."""

import json
from typing import Literal

import pytest
import redis

from headrace.common.redis.client import durability_problem
from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, encode
from headrace.common.wire.ledger import LedgerEntry
from headrace.learner.store import scripts
from headrace.learner.store.fenced_redis import Fenced, RedisLost
from headrace.learner.store.store import DEAD_PAYLOAD_BYTES, LearnerStore
from headrace.learner.store.structs import Cursor, Settlement
from tests.support.commits import queue
from tests.support.factories import make_ticket


def test_a_newer_learner_fences_the_older_one_off(client: redis.Redis, keys: Keys) -> None:
    older = LearnerStore(client, keys)
    newer = LearnerStore(client, keys)
    assert newer.epoch == older.epoch + 1
    with pytest.raises(Fenced, match=f"above {older.epoch}"):
        older.add_tickets(keys.tickets, [make_ticket()])
    with pytest.raises(Fenced):
        older.run_log.set_status({"phase": "training"})
    with pytest.raises(Fenced):
        older.settle([Settlement(keys.groups, "1-1", "0-0", "trained")])
    assert not client.exists(keys.learner) and not client.exists(keys.ledger)
    newer.run_log.set_status({"phase": "training"})
    assert client.hget(keys.learner, "phase") == b"training"


def test_a_ticket_is_added_once_and_the_cursor_moves_with_it(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    assert store.cursor() is None
    tickets = [make_ticket("0-0"), make_ticket("0-1")]
    store.add_tickets(keys.tickets, tickets, Cursor(0, 2))
    store.add_tickets(keys.tickets, tickets, Cursor(0, 2))
    assert client.xlen(keys.tickets) == 2
    assert store.cursor() == Cursor(0, 2)
    store.add_tickets(keys.eval_tickets, [make_ticket("eval-0-0", kind="eval")])
    assert store.cursor() == Cursor(0, 2)


def test_what_was_read_and_not_settled_is_found_again(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    for index in range(3):
        queue(client, keys, f"0-{index}", b"payload")
    client.xadd(keys.eval_groups, {"id": "eval-0-0", "group": "e"})
    entries = store.read(10, 0.1)
    assert sorted(entry.ticket_id for entry in entries) == ["0-0", "0-1", "0-2", "eval-0-0"]
    assert store.read(10, 0.01) == []
    first = next(entry for entry in entries if entry.ticket_id == "0-0")
    store.settle([Settlement(first.stream, first.entry_id, "0-0", "trained")])

    again = LearnerStore(client, keys)
    assert sorted(entry.ticket_id for entry in again.read_unsettled()) == ["0-1", "0-2", "eval-0-0"]
    assert again.queue_state()[:2] == (0, 2)
    known = again.ledger_entries(["0-0", "0-1", "0-9"])
    assert [one and one.state for one in known] == ["trained", "answered", None]
    assert sorted(again.unfinished()) == ["0-1", "0-2"]
    client.xdel(keys.groups, again.read_unsettled()[0].entry_id)
    assert sorted(entry.ticket_id for entry in again.read_unsettled()) == ["0-2", "eval-0-0"], "a deleted one is gone"


def test_a_group_that_cannot_be_used_is_buried_with_the_reason(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    entry_id = queue(client, keys, "0-0", b"\xff" * 100_000)
    (entry,) = store.read(10, 0.1)
    assert store.dead_letter(entry, "cannot decode") and not store.dead_letter(entry, "again")
    ((dead_id, fields),) = client.xrange(keys.dead_letters)
    assert fields[b"payload"] == b"\xff" * DEAD_PAYLOAD_BYTES
    assert {key: fields[key] for key in (b"id", b"reason", b"bytes")} == {
        b"id": b"0-0",
        b"reason": b"cannot decode",
        b"bytes": b"100000",
    }
    assert (client.xlen(keys.groups), store.num_dead()) == (0, 1)
    assert store.ledger_entries(["0-0"]) == [LedgerEntry("dead", dead_id.decode())] and entry_id == entry.entry_id


def test_what_a_checkpoint_knows_and_redis_forgot_is_repaired(client: redis.Redis, keys: Keys) -> None:
    """A Redis that is older than the checkpoint shows a trained ticket as open, or not at all."""
    store = LearnerStore(client, keys)
    store.add_tickets(keys.tickets, [make_ticket("0-0"), make_ticket("0-1")])
    queued = queue(client, keys, "0-2", b"group")
    names = ("0-0", "0-2", "0-3")
    store.settle([Settlement(keys.groups, queued, name, "trained") for name in names], groups="keep")
    assert [mark and mark.state for mark in store.ledger_entries(names)] == ["trained", "answered", "trained"]
    assert [fields[b"id"] for _, fields in client.xrange(keys.tickets)] == [b"0-1"]
    assert client.xlen(keys.groups) == 1, "a group that is there waits for the next checkpoint"


@pytest.mark.parametrize("groups", ["keep", "delete"])
def test_what_was_answered_again_after_redis_forgot_is_no_second_group(
    client: redis.Redis, keys: Keys, groups: Literal["keep", "delete"]
) -> None:
    """The ticket that it showed as open was leased again before the learner came back."""
    store = LearnerStore(client, keys)
    forgotten, second = "17-0", queue(client, keys, "0-0", b"group")
    assert second != forgotten
    store.settle([Settlement(keys.groups, forgotten, "0-0", "trained")], groups=groups)
    assert store.ledger_entries(["0-0"]) == [LedgerEntry("trained")] and client.xlen(keys.groups) == 0


def test_a_redis_that_lost_everything_is_told_from_a_newer_learner(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    client.delete(keys.epoch, keys.tickets, keys.groups)
    with pytest.raises(RedisLost):
        store.run_log.set_status({"phase": "training"})
    with pytest.raises(RedisLost):
        store.queue_state()
    again = LearnerStore(client, keys, above=7)
    assert again.epoch == 8
    again.run_log.set_status({"phase": "training"})


def test_a_redis_that_lacks_an_acknowledged_write_is_lost(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    store.add_tickets(keys.tickets, [make_ticket("0-0")])
    before = client.get(keys.write_number)
    store.add_tickets(keys.tickets, [make_ticket("0-1")])
    store.queue_state()
    client.set(keys.write_number, before)
    for write in (store.check_fence, store.queue_state, lambda: store.add_tickets(keys.tickets, [make_ticket("0-2")])):
        with pytest.raises(RedisLost, match="latest write is 1 of 2"):
            write()
    assert client.hlen(keys.ledger) == 2
    LearnerStore(client, keys).check_fence()


def test_a_late_copy_of_a_learners_first_command_fences_nobody(client: redis.Redis, keys: Keys) -> None:
    """Its answer was lost, it was sent again, and the first one arrives after all."""
    LearnerStore(client, keys)
    ((start, _),) = client.hgetall(keys.epochs).items()
    store = LearnerStore(client, keys)
    take_epoch = client.register_script(scripts.TAKE_EPOCH)
    late = take_epoch(keys=[keys.epoch, keys.epochs, keys.write_number], args=[start, 0])
    assert (late, store.epoch) == (1, 2)
    store.check_fence()
    assert LearnerStore(client, keys).epoch == 3


def test_heartbeats_that_are_none_are_passed_over(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    client.set(keys.replica("bad"), b"junk")
    client.set(keys.replica("good"), encode(Heartbeat("good", "http://h:1", "running", "", 1, 0, 0, 0, 0.0, 1.0)))
    assert [replica.replica for replica in store.replicas()] == ["good"]


def test_swap_pauses_are_taken_once_and_only_from_now_on(client: redis.Redis, keys: Keys) -> None:
    client.xadd(keys.events, {"kind": "weight_swap", "event": '{"pause_ms": 1.0}'})
    store = LearnerStore(client, keys)
    client.xadd(keys.events, {"kind": "weight_swap", "event": '{"pause_ms": 2.5}'})
    client.xadd(keys.events, {"kind": "step", "event": "{}"})
    assert store.run_log.take_swap_pauses_ms() == [2.5]
    assert store.run_log.take_swap_pauses_ms() == []


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


def test_a_row_is_an_event_and_its_numbers_are_history(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    row = {"kind": "step", "step": 3, "time_s": 1700000000.1234, "kl": float("nan"), "lr": 1 / 3e6, "tickets": ["0-0"]}
    store.run_log.append_row("step", row | {"is_best": True, "loss": float("-inf")})
    ((_, event),) = client.xrange(keys.events)
    assert event[b"kind"] == b"step" and b'"tickets":["0-0"]' in event[b"event"]
    ((_, fields),) = client.xrange(keys.history)
    assert fields[b"kind"] == b"step"
    assert json.loads(fields[b"row"]) == {
        "step": 3,
        "time_s": 1700000000.123,
        "kl": None,
        "lr": 3.333333e-7,
        "is_best": True,
        "loss": None,
    }
    LearnerStore(client, keys)
    with pytest.raises(Fenced):
        store.run_log.append_row("step", row)
    assert client.xlen(keys.history) == client.xlen(keys.events) == 1
