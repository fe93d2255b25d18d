"""Publishing beside the loop: it is held up for a copy, versions come in their order, and nothing goes wrong unseen."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from blake3 import blake3

from headrace.common.process.waiting import Reason
from headrace.common.redis.keys import Keys
from headrace.common.weights.files import Manifest
from headrace.learner.intake.group_source import IssueResult
from headrace.learner.loop import Loop
from headrace.learner.model.host_snapshots import SnapshotPool
from headrace.learner.stages import publishing
from headrace.learner.stages.wait_deadlines import Starved
from headrace.learner.weights.version_writer import VersionWriter
from tests.support.fake_services import until
from tests.support.guard import GUARD_S
from tests.support.launched_run import rows_of
from tests.support.replay import STEPS, assemble_loop, end

FULL = OSError(28, "No space left on device")


@pytest.fixture
def loop(recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path) -> Iterator[Loop]:
    found = assemble_loop(tmp_path, client, keys, recording)
    yield found
    end(found)


@contextmanager
def running(loop: Loop) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    yield thread
    thread.join(GUARD_S)
    assert not thread.is_alive()


def before_writing(loop: Loop, act: Callable[[int], None]) -> dict[int, Manifest]:
    """Does `act` with the step before its version is written; returns what is written, by step."""
    write, written = loop.versions._writer.write, dict[int, Manifest]()

    def act_and_write(folder: Path, version: int, step: int, *given: Any, **options: Any) -> Manifest:
        act(step)
        written[step] = write(folder, version, step, *given, **options)
        return written[step]

    loop.versions._writer.write = act_and_write  # type: ignore[method-assign]
    return written


def test_the_next_step_is_taken_while_a_version_is_on_its_way(loop: Loop, tmp_path: Path) -> None:
    may_go_on, announced, weights = threading.Event(), list[int](), dict[int, str]()
    written = before_writing(loop, lambda step: None if step != 2 else _wait_for(may_go_on))
    publish, take_note = loop._publish, loop.intake.on_announced
    name, parameter = next(iter(loop.trainer.policy.model.named_parameters()))

    def note_and_publish(num_groups: int = 0) -> None:
        weights[loop.progress.step] = blake3(parameter.detach().numpy().tobytes()).hexdigest()
        publish(num_groups)

    def note(version: int, num_groups: int = 0) -> None:
        announced.append(version)
        take_note(version, num_groups)

    loop._publish, loop.intake.on_announced = note_and_publish, note  # type: ignore[method-assign]
    with running(loop):
        until(lambda: loop.waits.is_waiting(Reason.WAITING_FOR_PUBLISH), "the third version waits", loop.waits.status)
        assert loop.progress.step == 3 and loop.versions.current == 2 and announced == [1, 2]
        assert [row["step"] for row in rows_of(tmp_path, "step")] == [1, 2]
        may_go_on.set()
    assert announced == list(range(1, STEPS + 2)) and not loop.waits.status()
    assert {step: manifest.tensors[name].blake3 for step, manifest in written.items()} == weights
    assert len(set(weights.values())) == STEPS + 1, "the weights do change"
    rows = {row["step"]: row["weight_version"] for row in rows_of(tmp_path, "step")}
    assert rows == {step: manifest.version for step, manifest in written.items() if step}, (
        "a row has its step's version"
    )


def _wait_for(event: threading.Event) -> None:
    assert event.wait(GUARD_S)


def test_what_a_version_replaces_is_admitted_when_it_is_announced(loop: Loop) -> None:
    may_go_on, rooms = threading.Event(), list[int]()
    before_writing(loop, lambda step: None if step != 1 else _wait_for(may_go_on))
    issue = loop.intake.source.issue

    def note_and_issue(store: Any, count: int, step: int, version: int) -> IssueResult:
        rooms.append(version)
        return issue(store, count, step, version)

    loop.intake.source.issue = note_and_issue  # type: ignore[method-assign]
    with running(loop):
        until(lambda: loop.waits.is_waiting(Reason.WAITING_FOR_PUBLISH), "the second version waits", loop.waits.status)
        outstanding = loop.config.learner.max_outstanding_groups
        arrived = loop.intake.settlement_log.counts["trained"] + len(loop.intake._pending.groups)
        assert loop.progress.step == 2 and arrived <= outstanding, "no place of a group in training was given away"
        assert set(rooms) == {1}
        may_go_on.set()


def test_what_a_publication_fails_with_ends_the_learner(loop: Loop) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise ZeroDivisionError("in the thread")

    before_writing(loop, fail)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        loop.run()
    assert loop.versions.current == 2 and loop.progress.step <= 3


def test_a_full_disk_is_a_wait_with_a_reason(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def refuse(step: int) -> None:
        if step == 2 and len(refused) < 3:
            refused.append(loop.waits.describe())
            raise FULL

    before_writing(loop, refuse)
    monkeypatch.setattr(publishing, "RETRY_S", 0.01)
    assert loop.run()
    assert "the weights cannot be written: [Errno 28] No space left on device for" in refused[-1]
    assert not loop.waits.status() and loop.versions.current == STEPS + 1, "it is the same version at every try"


def test_a_disk_that_stays_full_ends_the_learner_with_the_reason(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(step: int) -> None:
        if step == 2:
            raise FULL

    before_writing(loop, refuse)
    monkeypatch.setattr(publishing, "RETRY_S", 0.01)
    learner = loop.config.learner.model_copy(update={"starvation_deadline_s": 0.05})
    loop.live_config.config = loop.config.model_copy(update={"learner": learner})
    with pytest.raises(Starved, match=r"No space left|still being published"):
        loop.run()


def test_any_number_of_threads_writes_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for num_threads in (1, 3):
        generator = torch.Generator().manual_seed(0)
        weights = {f"w{index}": torch.randn(50, 40, generator=generator).bfloat16() for index in range(20)}
        writer, snapshots, folder = VersionWriter("test", num_threads), SnapshotPool(), tmp_path / str(num_threads)
        folder.mkdir()
        for version in (1, 2):
            writer.write(folder / f"v{version}", version, version, snapshots.take(weights))
            for index, tensor in enumerate(weights.values()):
                tensor[0, index] += 1
        written.append([(folder / "v2" / name).read_bytes() for name in ("manifest.json", "delta.bin")])
    assert written[0] == written[1] and written[0][1]


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    snapshots, tensor = SnapshotPool(), torch.zeros(8)
    first = snapshots.take({"a": tensor})
    tensor += 1
    second = snapshots.take({"a": tensor})
    assert first.tensors["a"].tolist() == [0.0] * 8 and second.tensors["a"].tolist() == [1.0] * 8
    places = {one.tensors["a"].data_ptr() for one in (first, second)}
    del first
    tensor += 1
    third = snapshots.take({"a": tensor})
    assert third.tensors["a"].data_ptr() in places and second.tensors["a"].tolist() == [1.0] * 8
    changed = snapshots.take({"a": tensor, "b": torch.ones(2, dtype=torch.bfloat16)})
    assert changed.tensors["b"].dtype == torch.bfloat16 and third.tensors["a"].tolist() == [2.0] * 8


def test_tensors_of_every_shape_and_layout_are_copied() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": whole.T, "part": whole[:, 2:4], "number": torch.tensor(3.0), "none": torch.empty(0, 3)}
    tensors |= {"half": whole.bfloat16(), "weight": torch.nn.Parameter(whole)}
    copied = SnapshotPool().take(tensors).tensors
    for name, tensor in tensors.items():
        assert torch.equal(copied[name], tensor) and copied[name].dtype == tensor.dtype, name
        assert copied[name].is_contiguous()
