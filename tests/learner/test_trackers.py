"""Trackers get every row and never disturb training: TensorBoard and W&B are real, trackio is a recorder."""

import importlib.util
import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.common.config import RunConfig
from headrace.common.preflight.recipe import UnavailableHere, check_trackers
from headrace.learner.reporting import trackers as trackers_module
from headrace.learner.reporting.trackers import Trackers
from tests.support.guard import GUARD_S

ROW = {"kind": "step", "step": 1, "loss": 0.25, "tickets": ["0-0"], "ess": float("nan")}


class Recorder:
    def __init__(self, *_: Any) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []
        self.is_closed = False

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.rows.append((dict(numbers), step))

    def close(self) -> None:
        self.is_closed = True


def two_starts(tracker: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose first learner is killed after step 3, with its checkpoint of step 2: its successor repeats step 3.

    The evaluation of step 1 ends after step 2.
    """
    monkeypatch.setattr(trackers_module, "CLOSE_TIMEOUT_S", GUARD_S)
    first = Trackers([tracker], folder, {"seed": 1}, 0)
    first.write(evaluation(0, 0.25))
    first.write(ROW | {"step": 1, "loss": 1.0})
    first.write(ROW | {"step": 2, "loss": 0.5})
    first.write(evaluation(1, 0.5))
    first.write(ROW | {"step": 3, "loss": 0.75})
    first.close()
    again = Trackers([tracker], folder, {"seed": 1}, 2)
    again.write(ROW | {"step": 3, "loss": 9.0})
    again.write(evaluation(3, 0.75))
    again.close()


def evaluation(step: int, held_out: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "held_out": held_out, "is_best": True}


def test_tensorboard_has_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_starts("tensorboard", tmp_path, monkeypatch)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("step/loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, 9.0)], "a step that is taken again counts once"
    held_out = [(event.step, event.value) for event in found.Scalars("evaluation/held_out")]
    assert held_out == [(0, 0.25), (1, 0.5), (3, 0.75)]
    assert "step/ess" not in found.Tags()["scalars"] and "step/tickets" not in found.Tags()["scalars"]


def test_tensorboard_has_a_repeated_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(trackers_module, "CLOSE_TIMEOUT_S", GUARD_S)
    for loss in (1.0, 9.0):
        trackers = Trackers(["tensorboard"], tmp_path, {}, 0)
        trackers.write(ROW | {"loss": loss})
        trackers.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("step/loss")] == [(1, 9.0)]


def test_wandb_has_every_row_over_an_axis_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, offline; it writes what it would send."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "demo").mkdir()
    try:
        two_starts("wandb", tmp_path / "demo", monkeypatch)
    finally:
        wandb.teardown()
    records = [record for path in sorted(tmp_path.rglob("run-demo.wandb")) for record in wandb_records(path)]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    losses = [(row["step/step"], row["step/loss"]) for row in rows if "step/loss" in row]
    assert losses == [(1, 1.0), (2, 0.5), (3, 0.75), (3, 9.0)]
    held_out = [(row["evaluation/step"], row["evaluation/held_out"]) for row in rows if "evaluation/held_out" in row]
    assert held_out == [(0, 0.25), (1, 0.5), (3, 0.75)]
    axes = {record.metric.glob_name or record.metric.name: record.metric.step_metric for record in records}
    assert axes["step/*"] == "step/step" and axes["evaluation/*"] == "evaluation/step"
    assert {record.run.run_id for record in records if record.HasField("run")} == {"demo"}


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of W&B's file: a header of 7 bytes, then records of LevelDB's log format (its doc/log_format.md)."""
    from wandb.proto.wandb_internal_pb2 import Record

    block_bytes, header_bytes, whole, first, last = 1 << 15, 7, 1, 2, 4
    content, at, parts = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + header_bytes <= len(content):
        if block_bytes - at % block_bytes < header_bytes:
            at += block_bytes - at % block_bytes
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        at += header_bytes
        parts = b"" if kind in (whole, first) else parts
        parts += content[at : at + length]
        at += length
        if kind in (whole, last):
            yield Record.FromString(parts)


def test_a_failing_tracker_is_logged_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Recorder):
        def log(self, numbers: Mapping[str, float], step: int) -> None:
            raise RuntimeError("the server is gone")

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no such project")

    good = Recorder()
    kinds = {"tensorboard": Failing, "trackio": refuse, "wandb": lambda *_: good}
    monkeypatch.setattr(trackers_module, "TRACKERS", kinds)
    trackers = Trackers(["tensorboard", "trackio", "wandb"], tmp_path, {}, 0)
    with caplog.at_level(logging.ERROR):
        for step in (1, 2, 3):
            trackers.write(ROW | {"step": step})
        trackers.close()
    assert [step for _, step in good.rows] == [1, 2, 3] and good.is_closed
    assert good.rows[0][0] == {"step/step": 1, "step/loss": 0.25}
    assert sorted(caplog.messages) == [
        "tracker tensorboard failed and gets no more rows: RuntimeError: the server is gone",
        "tracker trackio failed and gets no more rows: RuntimeError: no such project",
    ]


def test_a_hanging_tracker_costs_rows_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    class Hanging(Recorder):
        def log(self, numbers: Mapping[str, float], step: int) -> None:
            released.wait(GUARD_S)

    monkeypatch.setattr(trackers_module, "TRACKERS", {"wandb": Hanging})
    monkeypatch.setattr(trackers_module, "MAX_QUEUED_ROWS", 2)
    monkeypatch.setattr(trackers_module, "CLOSE_TIMEOUT_S", 0.05)
    trackers = Trackers(["wandb"], tmp_path, {}, 0)
    for step in range(20):
        trackers.write(ROW | {"step": step})
    trackers.close()
    released.set()
    assert "the trackers were too slow" in caplog.text


def test_without_trackers_there_is_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    trackers = Trackers([], tmp_path, {}, 0)
    trackers.write(ROW)
    assert threading.active_count() == before
    trackers.close()


def test_the_calls_to_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorder replaces trackio: it needs another version of pillow than SGLang, and cannot be installed beside
    it."""
    asked: list[tuple[str, Any]] = []

    def note(name: str) -> Any:
        return lambda *given, **named: asked.append((name, named | {"rows": given}))

    trackio = SimpleNamespace(init=note("init"), log=note("log"), finish=note("finish"))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    two_starts("trackio", tmp_path / "demo", monkeypatch)
    rows = [(call["step"], *call["rows"]) for name, call in asked if name == "log"]
    assert [step for step, _ in rows] == [0, 1, 2, 1, 3, 3, 3]
    assert rows[1] == (1, {"step/step": 1, "step/loss": 1.0})
    starts = [call for name, call in asked if name == "init"]
    assert [(start["name"], start["resume"], start["config"]) for start in starts] == [
        ("demo", "allow", {"seed": 1})
    ] * 2
    assert [name for name, _ in asked].count("finish") == 2


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.model_validate(
        {"model": {"path": "x"}, "task": {"name": "arithmetic"}, "trackers": ["tensorboard", "wandb"]}
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UnavailableHere, match="trackers: wandb is not installed here; expected `pip install wandb`"):
        check_trackers(config)
