"""Places of the data that make no ticket are named, marked in the ledger and passed; none of them ends a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from headrace.common.config import RunConfig
from headrace.common.redis.keys import Keys
from headrace.common.tasks import BadRow, Prompt
from headrace.common.wire.ledger import LedgerEntry
from headrace.learner.commands.audit import audit
from headrace.learner.commands.dead_letters import dead_letters, retry
from headrace.learner.intake import ticket_source
from headrace.learner.intake.held_out import Evaluation
from headrace.learner.intake.intake import Intake
from headrace.learner.intake.ticket_source import TicketSource
from headrace.learner.steering.switches import Switches
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor
from tests.learner.test_intake import LIMITS, make_config, plain_chat
from tests.support.commits import bury_all


def prompt(text: Any, answer: Any = "1") -> Prompt:
    return Prompt([{"role": "user", "content": text}], {"answer": answer})


class Rows:
    """A task of these rows, in this order, every epoch."""

    def __init__(self, *rows: Any, held_out: tuple[Any, ...] = (prompt("held out"),)) -> None:
        self.rows = {"train": rows, "held_out": held_out}

    def prompts(self, split: str, *, seed: int, epoch: int) -> Iterator[Any]:
        return iter(self.rows[split])

    def reward(self, completion: str, ticket: Any) -> float:
        return 0.0


GOOD = prompt("1 + 1")
BAD = {
    "a surrogate": (prompt("half \ud83d"), "half of a character"),
    "none": (prompt(None), "content is a NoneType, expected text"),
    "an object": (prompt("x", object()), "a reference with a object"),
    "no prompt": ("3 + 4", "expected a headrace.common.tasks.Prompt, found str"),
    "a bad row": (BadRow("row 7 has no answer"), "row 7 has no answer"),
}


def source_of(*rows: Any, max_sequence_tokens: int = 1100, **task: Any) -> TicketSource:
    return TicketSource(make_config(), Rows(*rows, **task), plain_chat(), [1], Cursor(0, 0), max_sequence_tokens)


@pytest.mark.parametrize("what", BAD)
def test_a_row_that_makes_no_ticket_is_dead_with_its_reason(
    client: redis.Redis, keys: Keys, tmp_path: Path, what: str
) -> None:
    bad, reason = BAD[what]
    source, store = source_of(GOOD, bad, GOOD), LearnerStore(client, keys)
    issued = source.issue(store, 4, 0, 1)
    assert issued.ticket_ids == ["0-0", "0-2", "1-0", "1-2"]
    assert [(one.ticket_id, one.state) for one in issued.unusable] == [("0-1", "dead"), ("1-1", "dead")]
    assert (source.cursor, store.cursor()) == (Cursor(1, 3), Cursor(1, 3))
    first, second = dead_letters(client, keys)
    assert first.is_ticket and first.ticket_id == "0-1"
    assert first.reason.startswith("prompt 1 of epoch 0: ") and reason in first.reason
    assert second.ticket_id == "1-1"
    found = audit(client, keys, tmp_path)
    assert not found.violations and found.counts == {"open": 4, "dead": 2}


def test_a_numpy_number_in_a_reference_is_a_number(client: redis.Redis, keys: Keys) -> None:
    (ticket,) = source_of(prompt("1 + 1", np.int64(2))).next_tickets(1, 0, 1)
    assert ticket.reference == {"answer": 2}


def test_a_prompt_that_never_fits_is_skipped_and_counted(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    store = LearnerStore(client, keys)
    source = source_of(GOOD, prompt("x" * 77), prompt("x" * 76))  # 1,024 new tokens each
    intake = Intake(make_config(), store, source, {1: 0}, lambda: LIMITS, [], Switches())
    intake.poll_once()
    assert intake.settlement_log.counts["skipped"] == 4 and intake.settlement_log.counts["dead"] == 0
    assert store.ledger_entries(["0-0", "0-1", "0-2"])[1] == LedgerEntry("skipped")
    assert not dead_letters(client, keys) and client.xlen(keys.tickets) == 8
    found = audit(client, keys, tmp_path)
    assert not found.violations and found.counts == {"open": 8, "skipped": 4}


def test_what_was_passed_stays_passed_after_a_restart(client: redis.Redis, keys: Keys) -> None:
    store = LearnerStore(client, keys)
    source_of(GOOD, BAD["none"][0]).issue(store, 2, 0, 1)
    again = source_of(GOOD, GOOD)
    again.issue(store, 2, 0, 1)  # a checkpoint's cursor, older than Redis's
    assert store.ledger_entries(["0-1"]) == [LedgerEntry("dead", dead_letters(client, keys)[0].entry_id)]
    assert len(dead_letters(client, keys)) == 1 and client.xlen(keys.tickets) == 2


def test_an_epoch_without_any_ticket_ends_the_run_with_the_reason() -> None:
    source = source_of(BAD["a bad row"][0], prompt("x" * 99))
    with pytest.raises(ValueError, match="none of the 2 training prompts of epoch 0 can be used; the last: 99 tokens"):
        source.next_tickets(1, 0, 1)


def test_many_bad_rows_are_passed_in_several_calls(
    client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticket_source, "MAX_UNUSABLE", 2)
    source, store = source_of(*[BAD["none"][0]] * 5, GOOD), LearnerStore(client, keys)
    issued = [source.issue(store, 1, 0, 1) for _ in range(3)]
    assert [(one.ticket_ids, len(one.unusable)) for one in issued] == [([], 2), ([], 2), (["0-5"], 1)]


def test_stop_texts_are_of_every_ticket() -> None:
    given = make_config().model_dump()
    given["sampling"]["stop"], given["evaluation"]["temperature"] = ["###"], 0.0
    source = TicketSource(RunConfig.model_validate(given), Rows(GOOD), plain_chat(), [1], Cursor(0, 0))
    tickets = [*source.next_tickets(1, 0, 1), *source.evaluation_tickets(0, 1)]
    assert [ticket.sampling.stop for ticket in tickets] == [["###"], ["###"]]


def test_a_task_that_raises_names_the_place() -> None:
    def broken() -> Iterator[Prompt]:
        yield GOOD
        raise KeyError("question")

    source = source_of()
    source._prompts = broken()
    with pytest.raises(ValueError, match="task 'arithmetic', prompt 1 of epoch 0: KeyError: 'question'"):
        source.next_tickets(2, 0, 1)


def test_a_held_out_prompt_that_makes_no_ticket_is_left_out() -> None:
    source = source_of(GOOD, held_out=(GOOD, BAD["none"][0], GOOD))
    assert Evaluation.of(0, 1, source.evaluation_tickets(0, 1)).waiting_for == {"eval-1-0", "eval-1-2"}
    with pytest.raises(ValueError, match=r"has no held-out prompts; held-out prompt 0: .*NoneType"):
        source_of(GOOD, held_out=(BAD["none"][0],)).evaluation_tickets(0, 1)


def test_a_dead_ticket_is_not_issued_again_with_another_prompt(client: redis.Redis, keys: Keys) -> None:
    """Whoever changes the data while the run goes on."""
    store, task = LearnerStore(client, keys), Rows(GOOD, GOOD)
    source = TicketSource(make_config(), task, plain_chat(), [1], Cursor(0, 0))
    intake = Intake(make_config(), store, source, {1: 0}, lambda: LIMITS, [], Switches())
    source.issue(store, 2, 0, 1)
    assert bury_all(client, keys, "tried three times") == ["0-0", "0-1"]
    task.rows["train"] = (GOOD, prompt("another"))
    assert retry(client, keys, []) == ["0-0", "0-1"]
    intake.poll_control_state()
    assert [mark and mark.state for mark in store.ledger_entries(["0-0", "0-1"])] == ["open", "dead"]
    assert not client.smembers(keys.retries)
