"""Trackers get every row and never hurt: TensorBoard for real, the others by what they are asked to do."""

import importlib.util
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.config import RunConfig
from common.preflight import NotHere, check_trackers
from services.learner import trackers as trackers_module
from services.learner.trackers import Trackers

ROW = {"kind": "step", "step": 1, "loss": 0.25, "tickets": ["0-0"], "ess": float("nan")}


class Told:
    def __init__(self, *_: Any) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []
        self.is_closed = False

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.rows.append((dict(numbers), step))

    def close(self) -> None:
        self.is_closed = True


def test_tensorboard_has_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(trackers_module, "CLOSE_TIMEOUT_S", 250.0)  # its import alone takes a while
    first = Trackers(["tensorboard"], tmp_path, {}, 0)
    for step in (1, 2, 3):
        first.write(ROW | {"step": step, "loss": 1.0 / step})
    first.write({"kind": "evaluation", "step": 3, "held_out": 0.5, "is_best": True})
    first.close()
    again = Trackers(["tensorboard"], tmp_path, {}, 2)
    again.write(ROW | {"step": 3, "loss": 9.0})
    again.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    scalars = [(event.step, event.value) for event in found.Scalars("step/loss")]
    assert scalars == [(1, 1.0), (2, 0.5), (3, 9.0)], "a step that is taken again counts once"
    assert [event.value for event in found.Scalars("evaluation/held_out")] == []
    assert "step/ess" not in found.Tags()["scalars"] and "step/tickets" not in found.Tags()["scalars"]


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Told):
        def log(self, numbers: Mapping[str, float], step: int) -> None:
            raise RuntimeError("the server is gone")

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no such project")

    good = Told()
    kinds = {"tensorboard": Failing, "trackio": refuse, "wandb": lambda *_: good}
    monkeypatch.setattr(trackers_module, "KINDS", kinds)
    trackers = Trackers(["tensorboard", "trackio", "wandb"], tmp_path, {}, 0)
    with caplog.at_level(logging.ERROR):
        for step in (1, 2, 3):
            trackers.write(ROW | {"step": step})
        trackers.close()
    assert [step for _, step in good.rows] == [1, 2, 3] and good.is_closed
    assert good.rows[0][0] == {"step/step": 1, "step/loss": 0.25}
    assert sorted(caplog.messages) == [
        "tracker tensorboard failed, and is given no more rows: RuntimeError: the server is gone",
        "tracker trackio failed, and is given no more rows: RuntimeError: no such project",
    ]


def test_a_tracker_that_hangs_costs_rows_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    class Hanging(Told):
        def log(self, numbers: Mapping[str, float], step: int) -> None:
            released.wait(30.0)

    monkeypatch.setattr(trackers_module, "KINDS", {"wandb": Hanging})
    monkeypatch.setattr(trackers_module, "MAX_QUEUED_ROWS", 2)
    monkeypatch.setattr(trackers_module, "CLOSE_TIMEOUT_S", 0.05)
    trackers = Trackers(["wandb"], tmp_path, {}, 0)
    for step in range(20):
        trackers.write(ROW | {"step": step})
    trackers.close()
    released.set()
    assert "rows were left out, they were too slow" in caplog.text


def test_without_trackers_there_is_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    trackers = Trackers([], tmp_path, {}, 0)
    trackers.write(ROW)
    assert threading.active_count() == before
    trackers.close()


def test_what_trackio_and_wandb_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def note(name: str) -> Any:
        return lambda *given, **named: asked.append((name, named or given))

    trackio = SimpleNamespace(init=note("trackio"), log=note("log"), finish=note("finish"))
    run = SimpleNamespace(log=note("wandb log"), finish=note("wandb finish"))

    def init(**named: Any) -> Any:
        asked.append(("wandb", named))
        return run

    wandb = SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "demo"
    trackers = Trackers(["trackio", "wandb"], folder, {"seed": 1}, 0)
    trackers.write(ROW)
    trackers.close()
    names = [name for name, _ in asked]
    assert names == ["trackio", "wandb", "log", "wandb log", "finish", "wandb finish"]
    given = dict(asked)
    assert given["trackio"]["name"] == given["wandb"]["id"] == "demo"
    assert given["wandb"]["resume"] == "allow", "a run that is taken up is not begun anew"
    assert given["wandb"]["config"] == {"seed": 1} and given["wandb log"] == {"step": 1}


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.model_validate(
        {"model": {"path": "x"}, "task": {"name": "arithmetic"}, "trackers": ["tensorboard", "wandb"]}
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(NotHere, match="trackers: wandb is not installed here; expected `pip install wandb`"):
        check_trackers(config)
