"""The best policy so far is complete, has the weights of the evaluated step, survives restarts, and is exported."""

import json
from pathlib import Path

import pytest
import redis
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.common.redis.keys import Keys
from headrace.learner.checkpoints.best import BEST, CONFIG_FOLDER, NEXT, BestPolicy, best_folder, read_best_record
from headrace.learner.commands.export import export
from headrace.learner.model.host_snapshots import SnapshotPool
from headrace.learner.store.fenced_redis import Fenced
from headrace.learner.weights.version_writer import VersionWriter
from tests.support.replay import STEPS, assemble_loop, end, make_recording


def nothing() -> None: ...


def write(content: str):  # type: ignore[no-untyped-def]
    return lambda path: path.write_text(content)


def make_best(run: Path, epoch: int = 1) -> BestPolicy:
    (run / CONFIG_FOLDER).mkdir(exist_ok=True)
    (run / CONFIG_FOLDER / "config.json").write_text("{}")
    return BestPolicy(run, epoch, nothing)


def kept(run: Path) -> tuple[int, float, str]:
    named = json.loads((run / BEST / "best.json").read_text())
    return named["step"], named["held_out"], (run / BEST / "model.safetensors").read_text()


def test_only_a_better_policy_becomes_the_best(tmp_path: Path) -> None:
    best = make_best(tmp_path)
    found = []
    for step, held_out in ((0, 0.3), (20, 0.6), (40, 0.6), (60, 0.5), (80, 0.9)):
        best.write_candidate(step, step + 1, write(f"weights of {step}"))
        found.append(best.keep_if_best(held_out))
        assert kept(tmp_path)[2] == f"weights of {kept(tmp_path)[0]}"
    assert found == [True, True, False, False, True] and kept(tmp_path) == (80, 0.9, "weights of 80")
    assert (tmp_path / BEST / "config.json").is_file()
    best.close()
    assert {path.name for path in tmp_path.iterdir()} == {BEST, CONFIG_FOLDER}
    again = make_best(tmp_path, epoch=2)
    again.write_candidate(20, 100, write("worse"))
    assert not again.keep_if_best(0.8) and kept(tmp_path)[0] == 80
    again.close()


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = make_best(tmp_path)
    best.write_candidate(0, 1, write("first"))
    assert best.keep_if_best(0.3)

    def die() -> None:
        raise KeyboardInterrupt

    best.write_candidate(20, 21, write("second"))
    monkeypatch.setattr(best, "_rename", die)
    with pytest.raises(KeyboardInterrupt):
        best.keep_if_best(0.6)
    assert (tmp_path / NEXT).is_dir() and (tmp_path / BEST).is_dir()
    named = read_best_record(tmp_path)
    assert named is not None and named.step == 20 and best_folder(tmp_path) == tmp_path / NEXT
    make_best(tmp_path, epoch=2).close()
    assert kept(tmp_path) == (20, 0.6, "second") and not (tmp_path / NEXT).exists()


def test_an_unfinished_candidate_of_an_earlier_start_is_deleted(tmp_path: Path) -> None:
    best = make_best(tmp_path)
    best.write_candidate(0, 1, write("weights"))
    best._writer.shutdown()
    assert list(tmp_path.glob("best-aside-*"))
    make_best(tmp_path, epoch=2).close()
    assert not list(tmp_path.glob("best*"))


def test_a_disk_error_loses_the_candidate_and_not_the_run(tmp_path: Path) -> None:
    def refuse(_: Path) -> None:
        raise OSError("No space left on device")

    best = make_best(tmp_path)
    best.write_candidate(0, 1, refuse)
    assert not best.keep_if_best(0.9) and read_best_record(tmp_path) is None
    best.write_candidate(20, 21, write("weights"))
    assert best.keep_if_best(0.5), "a candidate that could not be saved is not the best"
    best.close()


def test_a_fenced_learner_does_not_replace_the_best_policy(tmp_path: Path) -> None:
    def fenced() -> None:
        raise Fenced("a newer one has started")

    best = make_best(tmp_path)
    best._check_fence = fenced
    best.write_candidate(0, 1, write("weights"))
    with pytest.raises(Fenced):
        best.keep_if_best(0.9)
    assert read_best_record(tmp_path) is None
    best.close()


def test_the_candidate_has_the_weights_of_its_version_even_if_written_later(tmp_path: Path) -> None:
    """The next versions are published while the file is being written."""
    from safetensors.torch import load_file

    writer, snapshots = VersionWriter("epoch-1"), SnapshotPool()
    parameters = {"a": torch.full((3,), 1.0), "b": torch.arange(4.0)}
    writer.write(tmp_path / "v1", 1, 0, snapshots.take(parameters))
    copy_of_first = writer.newest_model_writer()
    for version in (2, 3):
        parameters["a"] += 1
        parameters["b"] += 1
        writer.write(tmp_path / f"v{version}", version, version - 1, snapshots.take(parameters))
    copy_of_first(tmp_path / "first.safetensors")
    writer.newest_model_writer()(tmp_path / "third.safetensors")
    first, third = load_file(tmp_path / "first.safetensors"), load_file(tmp_path / "third.safetensors")
    assert first["a"].tolist() == [1.0] * 3 and first["b"].tolist() == [0, 1, 2, 3]
    assert third["a"].tolist() == [3.0] * 3 and third["b"].tolist() == [2, 3, 4, 5]


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(2, 40)[None]).logits
    return found


def test_export_writes_the_requested_policy(client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    """With a real learner: the best is step 2's policy, though the weights have moved on when its result arrives."""
    run = tmp_path / "runs" / "x"
    with pytest.raises(ValueError, match="there is no folder"):
        export(run, tmp_path / "out")
    loop = assemble_loop(run, client, keys, make_recording(tmp_path / "recording.msgpack"))
    with pytest.raises(ValueError, match="has not kept a policy; there are no checkpoints yet"):
        export(run, tmp_path / "out")
    publish = loop._publish

    def publish_and_set_aside(num_groups: int = 0) -> None:
        publish(num_groups)
        if loop.progress.step == 2:
            loop.publisher.wait()
            loop.trainer.policy.model.save_pretrained(tmp_path / "two")
            loop.evaluator.best.write_candidate(2, loop.versions.current, loop.versions.newest_model_writer())

    loop._publish = publish_and_set_aside  # type: ignore[method-assign]
    assert loop.run()
    assert loop.evaluator.best.keep_if_best(0.5)
    loop.trainer.policy.model.save_pretrained(tmp_path / "last")
    end(loop)
    expected, last = logits(tmp_path / "two"), logits(tmp_path / "last")
    assert not torch.equal(expected, last)
    assert "step 2 of run x, the best (held-out 0.5000)" in export(run, tmp_path / "best", is_best=True)
    assert torch.equal(logits(tmp_path / "best"), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "best").chat_template
    assert f"step {STEPS} of run x, from checkpoint" in export(run, tmp_path / "newest")
    assert torch.equal(logits(tmp_path / "newest"), last)
    assert torch.equal(logits(tmp_path / "newest"), logits(run / BEST)) is False
    assert "the best" in export(run, tmp_path / "step", step=2)
    with pytest.raises(ValueError, match=r"has not kept step 3; there are \[2, 6\]"):
        export(run, tmp_path / "out", step=3)
    with pytest.raises(ValueError, match="exists already"):
        export(run, tmp_path / "best", is_best=True)
    (run / "policy").mkdir()
    (run / "policy" / "config.json").write_text("finished")
    (run / "summary.json").write_text(json.dumps({"steps": STEPS}))
    assert "its last" in export(run, tmp_path / "finished")
    assert (tmp_path / "finished" / "config.json").read_text() == "finished"
    (run / "summary.json").write_text(json.dumps({"steps": STEPS - 1}))
    assert "from checkpoint" in export(run, tmp_path / "longer"), "the run was made longer"
