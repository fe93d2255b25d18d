"""A run resumes with its initial data; other data are refused with the differences, or begin a new data epoch."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import redis

from headrace.common.config import RunConfig
from headrace.common.redis.keys import Keys
from headrace.common.tasks import BadRow
from headrace.learner.checkpoints.checkpoint import save_checkpoint
from headrace.learner.checkpoints.data_check import resolve_fingerprint, store_fingerprint, stored_fingerprint
from headrace.learner.checkpoints.record import CheckpointRecord
from headrace.learner.commands.dead_letters import dead_letters
from headrace.learner.intake import data_fingerprint
from headrace.learner.intake.data_fingerprint import Fingerprint, fingerprint_of
from headrace.learner.intake.ticket_source import TicketSource
from headrace.learner.store.store import LearnerStore
from headrace.learner.store.structs import Cursor
from tests.learner.test_intake import PlainTokenizer, make_config, plain_chat
from tests.learner.test_skipped_prompts import BAD, GOOD, Rows, prompt
from tests.support.replay import assemble_loop


def config_with(**changes: Any) -> RunConfig:
    given = make_config().model_dump()
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            given[section][key] = value
        else:
            given[section] = value
    return RunConfig.model_validate(given)


def resolved(known: Fingerprint | None, task: Rows, config: RunConfig | None = None, new: bool = False) -> Fingerprint:
    return resolve_fingerprint(config or make_config(), task, PlainTokenizer(), known, new)


ROWS = tuple(prompt(str(index), index) for index in range(9))


@pytest.mark.parametrize("row", [row for row, _ in BAD.values()], ids=BAD)
def test_the_same_data_have_the_same_fingerprint(row: Any) -> None:
    """Also if a row cannot be encoded."""
    known = resolved(None, Rows(*ROWS, row, held_out=(row, GOOD)))
    assert known.train.count == 10 and known.train.is_all
    assert resolved(known, Rows(*ROWS, row, held_out=(row, GOOD))) == known


@pytest.mark.parametrize(
    ("task", "config", "problem"),
    [
        (Rows(*ROWS[:8]), {}, "9 train prompts were there and 8 are"),
        (Rows(*ROWS, GOOD), {}, "9 train prompts were there and more than 9 are"),
        (Rows(*ROWS[:8], prompt("8", 9)), {}, "the train prompts have changed"),
        (Rows(*ROWS[:8], BadRow("8")), {}, "the train prompts have changed"),
        (Rows(*ROWS, held_out=(ROWS[0],)), {}, "the held-out prompts have changed"),
        (Rows(*ROWS), {"seed": 7}, "seed was 0 and is 7"),
        (Rows(*ROWS), {"task__name": "gsm8k"}, "task.name was 'arithmetic' and is 'gsm8k'"),
        (Rows(*ROWS), {"task__settings": {"path": "p"}}, "task.settings was {} and is {'path': 'p'}"),
        (Rows(*ROWS), {"task__system_prompt": "Be brief."}, "task.system_prompt was None and is 'Be brief.'"),
    ],
)
def test_other_data_are_refused_with_the_differences(task: Rows, config: dict[str, Any], problem: str) -> None:
    known = resolved(None, Rows(*ROWS))
    with pytest.raises(
        ValueError, match=f"the run began with other data: {problem}. Expected the same data, or .*--new-epo"
    ):
        resolved(known, task, config_with(**config))
    assert resolved(known, task, config_with(**config), new=True).train.is_all


def test_another_chat_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = resolved(None, Rows(*ROWS))
    monkeypatch.setattr(PlainTokenizer, "chat_template", "!{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="the model's chat template has changed"):
        resolved(known, Rows(*ROWS))


def test_a_long_or_slow_task_is_hashed_in_part_and_the_next_start_hashes_as_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data_fingerprint, "BUDGET_S", -1.0)
    monkeypatch.setattr(data_fingerprint, "MIN_ROWS", 5)
    known = resolved(None, Rows(*ROWS))
    assert (known.train.count, known.train.is_all) == (5, False)
    monkeypatch.setattr(data_fingerprint, "MIN_ROWS", 2)
    assert resolved(known, Rows(*ROWS)) == known


def test_numpys_numbers_count_as_numbers() -> None:
    rows = [prompt("x", value) for value in (np.int64(3), np.float64(0.5), np.True_)]
    known = fingerprint_of(make_config(), Rows(*rows), "t")
    assert known == fingerprint_of(make_config(), Rows(prompt("x", 3), prompt("x", 0.5), prompt("x", True)), "t")
    assert known != fingerprint_of(make_config(), Rows(*rows[:2], prompt("x", np.False_)), "t")


def test_the_fingerprint_is_stored_beside_the_cursor_and_in_checkpoints(
    client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    assert stored_fingerprint(client, keys, tmp_path) is None
    store = LearnerStore(client, keys)
    cursor, data = store_fingerprint(store, Cursor(2, 3), None, resolved(None, Rows(*ROWS)))
    assert (cursor, store.cursor(), stored_fingerprint(client, keys, tmp_path)) == (Cursor(2, 3), Cursor(2, 3), data)
    record = CheckpointRecord(1, 10, 1, Cursor(2, 3), {}, [], [], [], {}, 0.0, data=data)
    save_checkpoint(tmp_path, record, lambda folder: {})
    client.delete(keys.cursor)
    assert stored_fingerprint(client, keys, tmp_path) == data


def test_other_data_begin_with_the_next_epoch_once(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    store = LearnerStore(client, keys)
    store_fingerprint(store, Cursor(2, 3), None, resolved(None, Rows(*ROWS)))
    cursor = Cursor(2, 3)
    for _ in range(2):  # a restarted learner gets the same data epoch
        known = stored_fingerprint(client, keys, tmp_path)
        cursor, data = store_fingerprint(store, cursor, known, resolved(known, Rows(GOOD), new=True))
        assert store.cursor() == cursor
        assert (cursor, data.first_epoch) == (Cursor(3, 0), 3)
    source = TicketSource(make_config(), Rows(GOOD), plain_chat(), [1], cursor, data=data)
    assert [ticket.id for ticket in source.next_tickets(2, 0, 1)] == ["3-0", "4-0"]
    with pytest.raises(ValueError, match="ticket 2-0: the data of epoch 2 are gone: the run has others since epoch 3"):
        source.rebuild(["2-0"], 0, 1)
    source.issue_again(["2-1", "3-0"])  # from a checkpoint, after Redis lost its data
    assert sorted(source.ids_to_issue()) == ["2-1", "3-0"]
    assert source.issue(store, 1, 0, 1).ticket_ids == ["3-0"]
    assert [dead.ticket_id for dead in dead_letters(client, keys)] == ["2-1"] and not source.ids_to_issue()


def test_a_learner_with_other_data_is_refused_before_it_takes_over(
    client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    assemble_loop(tmp_path, client, keys, None)
    epoch = client.get(keys.epoch)
    with pytest.raises(ValueError, match=r"began with other data: seed was 0 and is 7; the train prompts have "):
        assemble_loop(tmp_path, client, keys, None, "seed=7")
    assert client.get(keys.epoch) == epoch, "the running learner is not fenced"
    loop = assemble_loop(tmp_path, client, keys, None, "seed=7", is_new_epoch=True)
    assert loop.intake.source.cursor == Cursor(1, 0)
    assert stored_fingerprint(client, keys, tmp_path) == loop.intake.source.data


def test_an_older_checkpoint_has_no_fingerprint() -> None:
    old = msgspec.to_builtins(CheckpointRecord(1, 10, 1, Cursor(2, 3), {}, [], [], [], {}, 0.0))
    del old["data"]
    assert msgspec.convert(old, CheckpointRecord).data is None
