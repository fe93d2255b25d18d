"""Admission, dynamic sampling, staleness at packing and evaluation, over a real Redis and a pretended replica."""

import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import pytest
import redis

from headrace.common.config import ModelConfig, RunConfig
from headrace.common.config.hot_reload import with_settings
from headrace.common.models.chat_template import ChatTemplate
from headrace.common.redis.keys import Keys
from headrace.common.tasks import Prompt
from headrace.common.wire import Group, Ticket, Timings, decode_ticket
from headrace.learner.commands.dead_letters import purge, retry
from headrace.learner.intake import intake as intake_module
from headrace.learner.intake.intake import Intake
from headrace.learner.intake.ticket_source import TicketSource
from headrace.learner.intake.validation import GroupLimits
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor, Settlement
from tests.support.commits import answer_all, queue
from tests.support.factories import make_rollout
from tests.support.guard import GUARD_S


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
    chat_template = "{{ messages[0]['content'] }}"
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    special_tokens_map: ClassVar[dict[str, str]] = {}
    all_special_tokens: ClassVar[list[str]] = []
    eos_token_id = 1

    def get_chat_template(self) -> str:
        return self.chat_template

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return messages[0]["content"]

    def encode(self, text: str, **_: object) -> list[int]:
        return list(text.encode())


def plain_chat() -> ChatTemplate:
    return ChatTemplate(PlainTokenizer(), ModelConfig(path="x"))


def make_config(**learner: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "x"},
            "task": {"name": "arithmetic"},
            "actor": {"group_size": 2},
            "learner": {"groups_per_step": 4, "max_staleness": 1, **learner},
            "evaluation": {"num_prompts": 3, "completions_per_prompt": 2},
        }
    )


LIMITS = GroupLimits(vocab_size=512, group_size=2, num_eval_samples=2, max_sequence_tokens=512, highest_version=50)


class Harness:
    """An intake, and a replica that answers every open ticket when it is told to."""

    def __init__(self, client: redis.Redis, keys: Keys, config: RunConfig, task: Counting | None = None) -> None:
        self.client = client
        self.keys = keys
        self.store = LearnerStore(client, keys)
        self.versions = {1: 0}
        self.source = TicketSource(config, task or Counting(), plain_chat(), [1], Cursor(0, 0))
        self.intake = self.new_intake(config, checkpointed=[])
        self.intake.advance(0)
        self.intake.on_announced(1)

    def new_intake(self, config: RunConfig, checkpointed: list[Settlement]) -> Intake:
        return Intake(config, self.store, self.source, self.versions, lambda: LIMITS, checkpointed, Switches())

    def answer(self, stream: str, rewards: tuple[float, ...] = (1.0, 0.0), version: int = 1) -> list[str]:
        """Commits a group for every open ticket of the stream."""

        def group(ticket: Ticket) -> Group:
            return Group(ticket, [make_rollout(r, version=version) for r in rewards], "r", Timings(0, 0, 0))

        return answer_all(self.client, self.keys, stream, group)

    def turn(self) -> None:
        """One turn of the intake's thread."""
        self.intake.poll_once()

    def outstanding(self) -> list[str]:
        return [fields[b"id"].decode() for _, fields in self.client.xrange(self.keys.tickets)]


def never() -> bool:
    return False


def test_groups_that_were_not_read_are_counted(
    client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "READ_COUNT", 3)
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets)
    unread = []
    for _ in range(4):
        harness.turn()
        unread.append(harness.intake.num_unread)
    assert unread == [5, 2, 0, 0]
    batch = harness.intake.take_batch(1.0, never)
    assert batch is not None
    harness.turn()
    assert harness.intake.num_unread == 0, "a batch in training was read"
    harness.intake.mark_trained(batch)
    harness.turn()
    assert harness.intake.num_unread == 0


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
    harness.intake.advance(1)
    harness.intake.mark_trained(batch)
    harness.turn()
    assert harness.outstanding() == [], "and while its version is on its way"
    harness.intake.on_announced(2, len(batch))
    harness.turn()
    assert harness.outstanding() == ["0-8", "0-9", "0-10", "0-11"]
    ((_, fields), *_) = client.xrange(keys.tickets)
    ticket = decode_ticket(fields[b"ticket"])
    assert (ticket.min_weight_version, ticket.issued_step) == (2, 1)


def test_tickets_are_issued_as_soon_as_a_step_has_made_room(
    client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is outstanding is here: there is nothing to wait for in Redis, and the turn waits for the learner."""
    harness = Harness(client, keys, make_config(max_staleness=0))
    harness.turn()
    harness.answer(keys.tickets)
    harness.turn()
    batch = harness.intake.take_batch(1.0, never)
    assert batch is not None
    monkeypatch.setattr("headrace.learner.intake.intake.READ_BLOCK_S", GUARD_S)
    changed, waiting = harness.intake._lock, threading.Event()
    wait_for = changed.wait_for

    def told(*arguments: Any) -> Any:
        waiting.set()
        return wait_for(*arguments)

    monkeypatch.setattr(changed, "wait_for", told)
    turn = threading.Thread(target=harness.turn, daemon=True)
    turn.start()
    assert waiting.wait(GUARD_S)
    assert harness.outstanding() == []
    harness.intake.mark_trained(batch)
    harness.intake.on_announced(2, len(batch))
    turn.join(GUARD_S)
    assert harness.outstanding() == ["0-4", "0-5", "0-6", "0-7"]


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
    assert harness.intake.settlement_log.counts["uniform"] == 8
    assert harness.outstanding() == [f"0-{i}" for i in range(8, 16)]
    assert harness.intake.outcomes.take_rewards() == [0.0] * 16


@pytest.mark.parametrize(("truncated", "state"), [("mask", "uniform"), ("train", "trained")])
def test_a_group_whose_only_other_reward_was_cut_off_is_uniform_where_that_is_masked(
    client: redis.Redis, keys: Keys, truncated: str, state: str
) -> None:
    config = make_config()
    config = config.model_copy(update={"actor": config.actor.model_copy(update={"truncated": truncated})})
    harness = Harness(client, keys, config)
    harness.turn()

    def group(ticket: Ticket) -> Group:
        rollouts = [make_rollout(1.0), make_rollout(0.0, finish_reason="length")]
        return Group(ticket, rollouts, "r", Timings(0, 0, 0))

    answer_all(client, keys, keys.tickets, group)
    harness.turn()
    assert harness.intake.settlement_log.counts["uniform"] == (8 if state == "uniform" else 0)
    assert (harness.intake.take_batch(0.0, never) is None) == (state == "uniform")


def test_the_newest_group_is_told_as_long_as_it_is_of_the_learners_step(client: redis.Redis, keys: Keys) -> None:
    """Uniform ones too: they are scored, not trained."""
    harness = Harness(client, keys, make_config())
    assert harness.intake.newest_if_fresh() is None
    harness.turn()
    names = harness.answer(keys.tickets, rewards=(1.0, 1.0))
    harness.turn()
    newest = harness.intake.newest_if_fresh()
    assert newest is not None and newest.ticket.id == names[-1]
    harness.versions[2] = 1
    harness.intake.advance(1)
    assert harness.intake.newest_if_fresh() is None


def test_a_batch_has_its_reward_though_all_of_it_arrived_before_the_step_before(
    client: redis.Redis, keys: Keys
) -> None:
    """Every completion counts once, in the step that decides it."""
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets, rewards=(1.0, 0.5))
    harness.turn()
    for step in (1, 2):
        batch = harness.intake.take_batch(1.0, never)
        assert batch is not None
        assert harness.intake.outcomes.take_rewards() == []
        harness.versions[step + 1] = step
        harness.intake.advance(step)
        harness.intake.mark_trained(batch)
        assert harness.intake.outcomes.take_rewards() == [1.0, 0.5] * 4
    harness.intake.on_announced(2, 8)
    harness.turn()
    harness.answer(keys.tickets, rewards=(0.25, 0.0))
    harness.turn()
    harness.versions[9] = 9
    harness.intake.advance(9)
    assert harness.intake.take_batch(0.0, never) is None
    assert harness.intake.outcomes.take_rewards() == [0.25, 0.0] * 8, "of what is dropped as stale"


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
    harness.intake.advance(2)
    harness.intake.on_announced(2)
    assert harness.intake.take_batch(0.0, never) is None
    assert harness.intake.settlement_log.counts["stale"] == 8
    told = harness.intake.outcomes.take_drop_statistics()
    assert (told["dropped_groups"], told["dropped_share"]) == (8.0, 1.0)
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
    harness.intake.advance(9)
    harness.intake.on_announced(1)
    batch = harness.intake.take_batch(1.0, never)
    assert batch is not None and {arrived.staleness.total for arrived in batch} == {9}
    harness.intake.mark_trained(batch)
    assert harness.intake.outcomes.take_drop_statistics()["dropped_share"] == 0.0


def test_epochs_follow_each_other(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config(), Counting(size=5))
    harness.turn()
    assert harness.outstanding() == [f"0-{i}" for i in range(5)] + [f"1-{i}" for i in range(3)]
    assert harness.store.cursor() == Cursor(1, 3)


def test_groups_that_cannot_be_used_are_dead_and_counted(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    queue(client, keys, "0-77", b"garbage")
    client.xadd(keys.groups, {"id": "0-78", "group": b"nobody's"})
    client.xadd(keys.groups, {"unheard": "of"})
    harness.answer(keys.tickets, version=99)
    harness.turn()
    assert harness.intake.settlement_log.counts["dead"] == 11
    assert harness.intake.outcomes.take_drop_statistics()["dropped_groups"] == 8, "those that can be read at all"
    reasons = {fields[b"id"]: fields[b"reason"].decode() for _, fields in client.xrange(keys.dead_letters)}
    assert "cannot decode" in reasons[b"0-77"]
    assert reasons[b"0-78"] == reasons[b"?"] == "the ledger knows no such group: it says nothing"
    assert "version 99, from the future" in reasons[b"0-0"]
    marks = harness.store.ledger_entries(["0-77", "0-0", "0-78"])
    assert [mark and mark.state for mark in marks] == ["dead", "dead", None]


def test_a_copy_of_a_group_is_refused_and_the_group_itself_is_trained(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets)
    for _, fields in client.xrange(keys.groups, count=2):
        client.xadd(keys.groups, fields)
    harness.turn()
    batch = harness.intake.take_batch(1.0, never)
    assert batch is not None and len({arrived.group.ticket.id for arrived in batch}) == 4
    assert client.xlen(keys.dead_letters) == 2
    assert [mark and mark.state for mark in harness.store.ledger_entries(["0-0", "0-1"])] == ["answered", "answered"]


def test_a_dead_ticket_is_issued_again_when_a_person_asks(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets, version=99)
    harness.turn()
    (died,) = harness.store.ledger_entries(["0-3"])
    assert died is not None and "from the future" in harness.store.dead_reason(died)
    assert retry(client, keys, ["0-3"]) == ["0-3"]
    client.sadd(keys.retries, "no such ticket")
    harness.intake.poll_control_state()
    assert "0-3" in harness.outstanding() and client.scard(keys.retries) == 0
    mark = harness.store.ledger_entries(["0-3"])[0]
    assert mark is not None and mark.state == "open" and client.xlen(keys.dead_letters) == 7
    with pytest.raises(ValueError, match="'0-3' is not dead"):
        retry(client, keys, ["0-3"])
    assert harness.store.dead_reason(died) == "", "it is dead no more"
    assert len(purge(client, keys, [])) == 7 and client.xlen(keys.dead_letters) == 0


def test_an_evaluation_is_beside_admission_and_counts_first_tokens(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.versions[2] = 4
    harness.intake.evaluation.begin(4, 2)
    harness.turn()
    assert len(harness.outstanding()) == 8
    assert harness.intake.evaluation.take_result() is None
    names = harness.answer(keys.eval_tickets, rewards=(1.0, 0.0), version=2)
    assert names == ["eval-2-0", "eval-2-1", "eval-2-2"]
    harness.turn()
    result = harness.intake.evaluation.take_result()
    assert result is not None
    assert (result["held_out"], result["num_completions"], result["first_token_step_mean"]) == (0.5, 6, 4.0)
    assert harness.intake.settlement_log.counts["evaluated"] == 3


def test_dead_evaluation_tickets_are_left_out_and_counted(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.intake.evaluation.begin(0, 1)
    client.hset(keys.ledger, "eval-1-1", "dead 1-0")
    ((_, first), *_) = [e for e in client.xrange(keys.eval_tickets) if e[1][b"id"] == b"eval-1-1"]
    assert decode_ticket(first[b"ticket"]).kind == "eval"
    for entry_id, fields in client.xrange(keys.eval_tickets):
        if fields[b"id"] == b"eval-1-1":
            client.xdel(keys.eval_tickets, entry_id)
    harness.answer(keys.eval_tickets)
    harness.turn()
    harness.intake.poll_control_state()
    result = harness.intake.evaluation.take_result()
    assert result is not None and (result["num_dead"], result["num_completions"]) == (1, 4)


def test_a_restarted_learner_evaluates_the_same_step_again(client: redis.Redis, keys: Keys) -> None:
    """Its version is another, so its tickets are; what the earlier life had asked is answered and left out."""
    first = Harness(client, keys, make_config())
    first.intake.evaluation.begin(0, 1)
    first.answer(keys.eval_tickets)
    second = Harness(client, keys, make_config())
    second.versions[2] = 0
    second.intake.evaluation.begin(0, 2)
    second.answer(keys.eval_tickets, rewards=(1.0, 1.0), version=2)
    second.turn()
    result = second.intake.evaluation.take_result()
    assert result is not None and (result["held_out"], result["num_completions"]) == (1.0, 6)
    assert second.intake.settlement_log.counts["evaluated"] == 6


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
    delta = first.intake.checkpoint_delta()
    assert (delta.counts["trained"], delta.cursor) == (4, Cursor(0, 8)) and delta.unsettled_bytes > 0
    assert delta.unfinished == ["0-4", "0-5", "0-6", "0-7"]
    assert [settlement.state for settlement in delta.settlements] == ["trained"] * 4

    second = Harness(client, keys, make_config())
    second.intake = second.new_intake(make_config(), delta.settlements)
    second.intake.advance(1)
    second.intake.on_announced(1)
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
    harness.intake.on_checkpointed(harness.intake.checkpoint_delta())
    assert client.xlen(keys.groups) == 8
    harness.intake.on_checkpointed(harness.intake.checkpoint_delta())
    assert client.xlen(keys.groups) == 0
    assert {client.hget(keys.ledger, f"0-{place}") for place in range(8)} == {b"uniform"}


def test_a_failure_of_the_thread_reaches_the_loop(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config(), Counting(size=0))
    harness.intake.start()
    with pytest.raises(ValueError, match="no training prompts"):
        harness.intake.take_batch(10.0, never)
    harness.intake.stop()


def test_a_replacement_keeps_everything_but_its_number_and_comes_once() -> None:
    source = TicketSource(make_config(), Counting(), plain_chat(), [1], Cursor(2, 5))
    (ticket,) = source.next_tickets(1, 3, 4)
    source.replace_stale(msgspec.structs.replace(ticket, attempts=2, avoid=["r"]))
    assert source.ids_to_issue() == ["2-5.1"]
    again = source._to_reissue[0]
    assert again == msgspec.structs.replace(ticket, id="2-5.1", reissues=1)
    source.replace_stale(again)
    assert source.ids_to_issue() == ["2-5.1"], "what replaced one is not replaced again"


def test_a_ticket_is_made_again_from_its_id() -> None:
    source = TicketSource(make_config(), Counting(size=9), plain_chat(), [1], Cursor(1, 0))
    tickets = source.next_tickets(9, 3, 4)
    assert source.rebuild(["1-7", "1-2"], 3, 4) == [tickets[7], tickets[2]]
    (second_life,) = source.rebuild(["1-2.1"], 3, 4)
    assert second_life == msgspec.structs.replace(tickets[2], id="1-2.1", reissues=1)
    for name, reason in (
        ("1-9", "no such prompt"),
        ("eval-1-0", "evaluation is over"),
        ("x", "expected epoch-position"),
    ):
        with pytest.raises(ValueError, match=reason):
            source.rebuild([name], 3, 4)


def test_a_change_of_temperature_reaches_tickets_that_are_issued_from_now_on(client: redis.Redis, keys: Keys) -> None:
    """The one of before stands in the tickets that are out, and the learner divides by what stands there."""
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets)
    harness.turn()
    harness.intake.configure(with_settings(make_config(), {"sampling.temperature": 0.5}))
    harness.versions[2] = 2
    harness.intake.advance(2)
    harness.intake.on_announced(2)
    assert harness.intake.take_batch(0.0, never) is None
    harness.turn()
    tickets = [decode_ticket(fields[b"ticket"]) for _, fields in client.xrange(keys.tickets)]
    assert [ticket.id for ticket in tickets[:2]] == ["0-0.1", "0-1.1"], "also the same prompts once more"
    assert {ticket.sampling.temperature for ticket in tickets} == {0.5}


@pytest.mark.parametrize(
    ("max_staleness", "max_mean_staleness", "most"), [(1, None, 8), (1, 0.5, 6), (1, 0.0, 4), (1, 3.0, 8), (3, 0.6, 6)]
)
def test_admission_is_by_the_mean_staleness_asked_for(
    client: redis.Redis, keys: Keys, max_staleness: int, max_mean_staleness: float | None, most: int
) -> None:
    """Groups per step: 4. Nothing is dropped sooner for it."""
    harness = Harness(client, keys, make_config(max_staleness=max_staleness, max_mean_staleness=max_mean_staleness))
    harness.turn()
    assert len(harness.outstanding()) == most
    harness.answer(keys.tickets)
    harness.turn()
    harness.versions[2] = 1
    harness.intake.advance(1)
    harness.intake.on_announced(2)
    assert harness.intake.take_batch(0.0, never) is not None
    assert harness.intake.settlement_log.counts["stale"] == 0


def test_a_lower_max_staleness_admits_less_and_drops_more(client: redis.Redis, keys: Keys) -> None:
    harness = Harness(client, keys, make_config())
    harness.turn()
    harness.answer(keys.tickets)
    harness.turn()
    harness.versions[2] = 1
    harness.intake.advance(1)
    harness.intake.on_announced(2)
    harness.intake.configure(with_settings(make_config(), {"learner.max_staleness": 0}))
    assert harness.intake.take_batch(0.0, never) is None
    assert harness.intake.settlement_log.counts["stale"] == 8
    harness.turn()
    assert len(harness.outstanding()) == 4
