"""Checkpoints: what is saved comes back, two are kept, an unreadable newest is passed over; reports are cut back."""

from pathlib import Path

import pytest
import torch

from services.learner.checkpoint import Record, load_newest, save_checkpoint
from services.learner.metrics import percentile
from services.learner.report import MetricsFile, summarise
from services.learner.store import Cursor, Settlement


def make_record(step: int) -> Record:
    return Record(
        step=step,
        version=step + 1,
        cursor=Cursor(1, 7),
        version_steps={1: 0, 2: 1},
        settlements=[Settlement("groups", "1-0", "0-3", "trained")],
        counts={"trained": 4},
        wall_s=1.5,
    )


def save(root: Path, step: int) -> None:
    save_checkpoint(root, make_record(step), {"master.w": torch.full((2, 3), float(step)), "step.w": torch.tensor(3.0)})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 5)
    found = load_newest(tmp_path)
    assert found is not None
    record, tensors = found
    assert record == make_record(5)
    assert torch.equal(tensors["master.w"], torch.full((2, 3), 5.0)) and tensors["step.w"].shape == ()


def test_two_are_kept_and_the_newest_is_taken(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    found = load_newest(tmp_path)
    assert found is not None and found[0].step == 15


@pytest.mark.parametrize("broken", ["state.safetensors", "record.json"])
def test_an_unreadable_newest_is_passed_over(tmp_path: Path, broken: str) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    path = tmp_path / "step-00000010" / broken
    path.write_bytes(path.read_bytes()[:20])
    found = load_newest(tmp_path)
    assert found is not None and found[0].step == 5


def test_what_was_never_renamed_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir(parents=True)
    (tmp_path / "aside" / "record.json").write_text("{}")
    assert load_newest(tmp_path) is None


def test_rows_of_steps_to_be_taken_again_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.append({"kind": "step", "step": step})
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    second = MetricsFile(path, 2)
    second.append({"kind": "step", "step": 3, "again": True})
    second.close()
    rows = MetricsFile(path, 3).rows
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["again"]


def test_the_summary_by_hand() -> None:
    steps = [
        {
            "kind": "step",
            "step": n,
            "wall_s": 10.0 * n,
            "generated_tokens": 100 * n,
            "trained_tokens": 30.0,
            "staleness_mean": float(n),
            "staleness_max": 2.0 * n,
            "wait_s": 4.0,
            "swap_pauses_ms": [float(n)],
        }
        for n in (1, 2)
    ]
    evaluations = [{"kind": "evaluation", "step": n, "held_out": 0.3 + n, "num_completions": 8} for n in (0, 2)]
    summary = summarise([evaluations[0], *steps, evaluations[1]], {"trained": 8, "uniform": 3}, generation_lag=0.25)
    assert (summary["held_out_before"], summary["held_out_after"]) == (0.3, 2.3)
    assert (summary["steps"], summary["wall_s"], summary["tokens_per_s"]) == (2, 20.0, 10.0)
    assert summary["groups"] == {"trained": 8, "uniform": 3, "stale": 0, "dead": 0, "evaluated": 0}
    assert summary["weight_pause_ms"] == {"p50": 1.5, "p95": pytest.approx(1.95)}
    assert summary["staleness"] == {"mean": 1.5, "max": 4.0}
    assert summary["lag"] == {"generation": 0.25, "learner": 0.4}


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert percentile([], 0.5) == 0.0
