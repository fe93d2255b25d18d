"""Admission, dynamic sampling, staleness at packing and evaluation, over a real Redis and a pretended replica."""

import itertools
from collections.abc import Iterator

import msgspec
import pytest
import redis

from common.config import RunConfig
from common.keys import Keys
from common.tasks import Prompt
from common.wire import Group, Ticket, Timings, decode_ticket, encode
from services.learner.intake import Intake, Starved
from services.learner.prompts import TicketSource
from services.learner.store import Cursor, LearnerStore
from tests.making import make_rollout


class Counting:
    """A task of `size` prompts an epoch."""

    def __init__(self, size: int = 1000) -> None:
        self.size = size

    def prompts(self, split: str, *, seed: int, epoch: int) -> Iterator[Prompt]:
        for index in range(self.size):
            yield Prompt([{"role": "user", "content": f"{split} {epoch} {index}"}], {"answer": str(index)})

    def reward(self, completion: str, ticket: Ticket) -> float:
        return 0.0


class PlainTokenizer:
    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return messages[0]["content"]

    def encode(self, text: str, **_: object) -> list[int]:
        return list(text.encode())


def make_config(**learner: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "x"},
            "task": {"name": "arithmetic"},
            "actor": {"group_size": 2},
            "learner": {"groups_per_step": 4, "max_staleness": 1, **learner},
            "evaluation": {"num_prompts": 3, "num_samples": 2},
        }
    )


class Harness:
    """An intake, and a replica that answers every open ticket when it is told to."""

    def __init__(self, client: redis.Redis, keys: Keys, config: RunConfig, task: Counting | None = None) -> None:
        self.client = client
        self.keys = keys
        self.store = LearnerStore(client, keys)
        self.versions = {1: 0}
        source = TicketSource(config, task or Counting(), PlainTokenizer(), [1], Cursor(0, 0))
        self.intake = Intake(config, self.store, source, self.versions, recorded=[])
        self.intake.advance(0, 1)
        self.numbers = itertools.count()

    def answer(self, stream: str, rewards: tuple[float, ...] = (1.0, 0.0), version: int = 1) -> list[str]:
        """Commits a group for every open ticket of the stream."""
        target = self.keys.evaluated if stream == self.keys.eval else self.keys.groups
        names = []
        for entry_id, fields in self.client.xrange(stream):
            ticket = decode_ticket(fields[b"ticket"])
            group = Group(ticket, [make_rollout(r, version=version) for r in rewards], "r", Timings(0, 0, 0))
            self.client.xadd(target, {"id": ticket.id, "group": encode(group)})
            self.client.xdel(stream, entry_id)
            names.append(ticket.id)
        return names

    def turn(self) -> None:
        """One turn of the intake's thread."""
        self.intake.turn()

    def outstanding(self) -> list[str]:
        return [fields[b"id"].decode() for _, fields in self.client.xrange(self.keys.tickets)]


def never() -> bool:
    return False


def test_admission_counts_open_tickets_and_groups_not_yet_trained(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    assert harness.outstanding() == [f"0-{i}" for i in range(8)]
    harness.answer(keys.tickets)
    harness.turn()
    assert harness.outstanding() == []
    batch = harness.intake.take_batch(1.0, never)
    assert batch is not None
    assert [arrived.group.ticket.id for arrived in batch] == ["0-0", "0-1", "0-2", "0-3"]
    harness.turn()
    assert harness.outstanding() == [], "a batch in training still counts"
    harness.versions[2] = 1
    harness.intake.advance(1, 2)
    harness.intake.mark_trained(batch)
    harness.turn()
    assert harness.outstanding() == ["0-8", "0-9", "0-10", "0-11"]
    ((_, fields), *_) = client.xrange(keys.tickets)
    ticket = decode_ticket(fields[b"ticket"])
    assert (ticket.min_weight_version, ticket.issued_step) == (2, 1)


def test_consumed_groups_that_await_a_checkpoint_do_not_count(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    for _ in range(3):
        harness.answer(keys.tickets, rewards=(1.0, 1.0))
        harness.turn()
        harness.turn()
    assert len(harness.outstanding()) == 8
    assert client.xlen(keys.groups) == 24


def test_uniform_groups_are_replaced_by_the_next_prompt(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets, rewards=(0.0, 0.0))
    harness.turn()
    harness.turn()
    assert harness.intake.counts["uniform"] == 8
    assert harness.outstanding() == [f"0-{i}" for i in range(8, 16)]
    assert harness.intake.take_sampled_rewards() == [0.0] * 16


def test_without_dynamic_sampling_uniform_groups_are_trained(client: redis.Redis, keys: Keys) -> None:
    config = make_config()
    plain = config.model_copy(update={"actor": config.actor.model_copy(update={"dynamic_sampling": False})})
    harness = Harness(client, keys, plain)
    harness.turn()
    harness.answer(keys.tickets, rewards=(0.0, 0.0))
    harness.turn()
    assert harness.intake.take_batch(1.0, never) is not None


def test_stale_groups_are_dropped_at_packing_and_their_prompt_comes_once_more(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets)
    harness.turn()
    harness.versions[2] = 2
    harness.intake.advance(2, 2)
    with pytest.raises(Starved, match="no step for 0 s: 0 of 4 groups"):
        harness.intake.take_batch(0.0, never)
    assert harness.intake.counts["stale"] == 8
    harness.turn()
    assert harness.outstanding() == [f"0-{i}.1" for i in range(8)]
    harness.answer(keys.tickets, version=1)
    harness.turn()
    assert harness.intake.take_batch(0.0, lambda: True) is None
    harness.turn()
    assert harness.outstanding() == [f"0-{i}" for i in range(8, 16)], "the second time, the next prompts"


def test_stale_policy_train_keeps_them(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config(stale_policy="train"))
    harness.turn()
    harness.answer(keys.tickets)
    harness.turn()
    harness.intake.advance(9, 1)
    batch = harness.intake.take_batch(1.0, never)
    assert batch is not None and {arrived.staleness.total for arrived in batch} == {9}


def test_epochs_follow_each_other(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config(), Counting(size=5))
    harness.turn()
    assert harness.outstanding() == [f"0-{i}" for i in range(5)] + [f"1-{i}" for i in range(3)]
    assert harness.store.cursor() == Cursor(1, 3)


def test_groups_that_cannot_be_used_are_dead_and_counted(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    client.xadd(keys.groups, {"id": "0-77", "group": b"garbage"})
    harness.answer(keys.tickets, version=99)
    harness.turn()
    assert harness.intake.counts["dead"] == 9
    reasons = {fields[b"id"]: fields[b"reason"].decode() for _, fields in client.xrange(keys.dead)}
    assert "cannot decode" in reasons[b"0-77"]
    assert "version 99, which was never published" in reasons[b"0-0"]


def test_an_evaluation_is_beside_admission_and_counts_first_tokens(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.versions[2] = 4
    harness.intake.begin_evaluation(4, 2)
    harness.turn()
    assert len(harness.outstanding()) == 8
    assert harness.intake.finished_evaluation() is None
    names = harness.answer(keys.eval, rewards=(1.0, 0.0), version=2)
    assert names == ["eval-2-0", "eval-2-1", "eval-2-2"]
    harness.turn()
    result = harness.intake.finished_evaluation()
    assert result is not None
    assert (result["held_out"], result["num_completions"], result["first_token_step_mean"]) == (0.5, 6, 4.0)
    assert harness.intake.counts["evaluated"] == 3


def test_dead_evaluation_tickets_are_left_out_and_counted(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.intake.begin_evaluation(0, 1)
    client.hset(keys.ledger, "eval-1-1", "dead")
    ((_, first), *_) = [e for e in client.xrange(keys.eval) if e[1][b"id"] == b"eval-1-1"]
    assert decode_ticket(first[b"ticket"]).kind == "eval"
    for entry_id, fields in client.xrange(keys.eval):
        if fields[b"id"] == b"eval-1-1":
            client.xdel(keys.eval, entry_id)
    harness.answer(keys.eval)
    harness.turn()
    harness.intake.give_up_dead_evaluations()
    result = harness.intake.finished_evaluation()
    assert result is not None and (result["num_dead"], result["num_completions"]) == (1, 4)


def test_a_restarted_learner_evaluates_the_same_step_again(client: redis.Redis, keys: Keys) -> None:
    """Its version is another, so its tickets are; what the earlier life had asked is answered and left out."""
    first = Harness(client, keys, make_config())
    first.intake.begin_evaluation(0, 1)
    first.answer(keys.eval)
    second = Harness(client, keys, make_config())
    second.versions[2] = 0
    second.intake.begin_evaluation(0, 2)
    second.answer(keys.eval, rewards=(1.0, 1.0), version=2)
    second.turn()
    result = second.intake.finished_evaluation()
    assert result is not None and (result["held_out"], result["num_completions"]) == (1.0, 6)
    assert second.intake.counts["evaluated"] == 6


def test_a_restarted_intake_skips_what_the_checkpoint_recorded_and_takes_the_rest(
    client: redis.Redis, keys: Keys
) -> None:
    first = Harness(client, keys, make_config())
    first.turn()
    first.answer(keys.tickets)
    first.turn()
    batch = first.intake.take_batch(1.0, never)
    assert batch is not None
    first.intake.mark_trained(batch)
    recorded = first.intake.consumed()
    assert [settlement.state for settlement in recorded] == ["trained"] * 4

    second = Harness(client, keys, make_config())
    second.intake = Intake(make_config(), second.store, second.intake.source, second.versions, recorded=recorded)
    second.intake.advance(1, 1)
    second.intake.start()
    again = second.intake.take_batch(5.0, never)
    second.intake.stop()
    assert again is not None
    assert [arrived.group.ticket.id for arrived in again] == ["0-4", "0-5", "0-6", "0-7"]


def test_groups_leave_redis_one_checkpoint_after_the_one_that_recorded_them(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets, rewards=(1.0, 1.0))
    harness.turn()
    harness.intake.checkpointed(harness.intake.consumed())
    assert client.xlen(keys.groups) == 8
    harness.intake.checkpointed(harness.intake.consumed())
    assert client.xlen(keys.groups) == 0
    assert set(client.hgetall(keys.ledger).values()) == {b"uniform"}


def test_a_failure_of_the_thread_reaches_the_loop(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config(), Counting(size=0))
    harness.intake.start()
    with pytest.raises(ValueError, match="no training prompts"):
        harness.intake.take_batch(10.0, never)
    harness.intake.stop()


def test_reissues_keep_everything_but_their_number() -> None:
    source = TicketSource(make_config(), Counting(), PlainTokenizer(), [1], Cursor(2, 5))
    (ticket,) = source.next_train(1, 3, 4)
    again = source.reissue(msgspec.structs.replace(ticket, attempts=2, avoid=["r"]), 6, 8)
    assert (ticket.id, again.id) == ("2-5", "2-5.1")
    assert (again.prompt_tokens, again.reference) == (ticket.prompt_tokens, ticket.reference)
    assert (again.min_weight_version, again.issued_step, again.attempts, again.reissues) == (8, 6, 0, 1)
