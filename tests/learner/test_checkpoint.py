"""Checkpoints: reading them back, keeping two, skipping an unreadable one; rows of repeated steps are dropped."""

from pathlib import Path

import msgspec
import pytest
import torch

from headrace.learner.checkpoints.checkpoint import CheckpointError, find_newest, save_checkpoint
from headrace.learner.checkpoints.record import CheckpointRecord, checkpoint_folders, read_record
from headrace.learner.distributed.state_files import read_state, write_state
from headrace.learner.reporting.summary import MetricsFile, percentile, summarise
from headrace.learner.store.fenced_redis import Fenced
from headrace.learner.store.structs import Cursor, Settlement


def make_record(step: int, epoch: int = 1) -> CheckpointRecord:
    return CheckpointRecord(
        epoch=epoch,
        step=step,
        version=step + 1,
        cursor=Cursor(1, 7),
        version_steps={1: 0, 2: 1},
        settlements=[Settlement("groups", "1-0", "0-3", "trained")],
        earlier=[Settlement("groups", "0-9", "0-2", "uniform")],
        unfinished=["0-8", "0-3.1"],
        counts={"trained": 4},
        wall_s=1.5,
    )


def save(root: Path, step: int, epoch: int = 1) -> Path:
    tensors = {"master.w": torch.full((2, 3), float(step)), "step.w": torch.tensor(3.0)}
    return save_checkpoint(root, make_record(step, epoch), lambda folder: write_state(folder, tensors))


def newest_step(root: Path) -> int:
    found = find_newest(root)
    assert found is not None
    return found[0].step


def test_a_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    assert find_newest(tmp_path) is None
    save(tmp_path, 5)
    found = find_newest(tmp_path)
    assert found is not None
    record, folder = found
    tensors = read_state(folder, sorted(record.files))
    assert msgspec.structs.replace(record, files={}) == make_record(5) and set(record.files) == {"state.safetensors"}
    assert torch.equal(tensors["master.w"], torch.full((2, 3), 5.0)) and tensors["step.w"].shape == ()


def test_two_are_kept_and_the_newest_is_taken(tmp_path: Path) -> None:
    for step in (5, 10, 10, 15):  # twice at one step: nothing is written over
        save(tmp_path, step)
    assert [read_record(folder).step for folder in checkpoint_folders(tmp_path)] == [10, 15]
    assert len(list(tmp_path.iterdir())) == 2 and newest_step(tmp_path) == 15


def test_a_checkpoint_of_a_fenced_learner_is_not_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step, epoch=1)
    save(tmp_path, 11, epoch=2)
    save(tmp_path, 20, epoch=1)
    assert newest_step(tmp_path) == 11


def test_a_learner_that_is_fenced_while_it_writes_leaves_no_checkpoint(tmp_path: Path) -> None:
    def fenced() -> None:
        raise Fenced("a newer one has started")

    with pytest.raises(Fenced):
        save_checkpoint(tmp_path, make_record(5), lambda folder: {}, fenced)
    assert find_newest(tmp_path) is None


@pytest.mark.parametrize("broken", ["state.safetensors", "record.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_an_unreadable_newest_checkpoint_is_skipped_and_renamed(tmp_path: Path, broken: str, damage: str) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 10) / broken
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content[:20] if damage == "truncated" else content)
    if damage == "missing":
        path.unlink()
    assert newest_step(tmp_path) == 5
    save(tmp_path, 6, epoch=2)
    assert [read_record(folder).step for folder in checkpoint_folders(tmp_path)] == [5, 6]
    assert (tmp_path / "unreadable-checkpoint-000001-000002").is_dir()


def test_a_run_whose_checkpoints_are_all_unreadable_does_not_start_over(tmp_path: Path) -> None:
    for step in (5, 10):
        (save(tmp_path, step) / "record.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: checkpoint-000001-000002"):
        find_newest(tmp_path)
    assert len(checkpoint_folders(tmp_path)) == 2


def test_a_disk_error_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "aside-000001").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="aside-000001"):
        save(tmp_path, 10)
    assert newest_step(tmp_path) == 5
    (tmp_path / "aside-000001").unlink()
    save(tmp_path, 10)
    assert newest_step(tmp_path) == 10


def test_a_folder_that_was_never_renamed_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "aside-000001").mkdir(parents=True)
    (tmp_path / "aside-000001" / "record.json").write_text("{}")
    assert find_newest(tmp_path) is None


def test_rows_of_steps_that_will_be_repeated_are_dropped(tmp_path: Path) -> None:
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


def test_a_fenced_learner_adds_no_row(tmp_path: Path) -> None:
    older = MetricsFile(tmp_path / "metrics.jsonl", 0)
    newer = MetricsFile(tmp_path / "metrics.jsonl", 0)
    older.append({"kind": "step", "step": 1})
    newer.append({"kind": "step", "step": 1, "newer": True})
    older.close()
    newer.close()
    assert MetricsFile(tmp_path / "metrics.jsonl", 9).rows == [{"kind": "step", "step": 1, "newer": True}]


def test_a_learner_that_is_overtaken_while_it_starts_replaces_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    is_fenced = False

    def sleep_and_be_overtaken() -> None:
        nonlocal is_fenced
        if is_fenced:
            raise Fenced
        is_fenced = True
        newer = MetricsFile(path, 0, 2)
        newer.append({"kind": "step", "step": 1})
        newer.close()

    with pytest.raises(Fenced):
        MetricsFile(path, 0, 1, sleep_and_be_overtaken)
    assert [row["step"] for row in MetricsFile(path, 9, 3).rows] == [1]


def test_the_summary_by_hand() -> None:
    steps = [
        {
            "kind": "step",
            "step": n,
            "wall_s": 10.0 * n,
            "run_generated_tokens": 100 * n,
            "batch_tokens": 30.0,
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
