"""`Engine` and faults that cannot be provoked in the real SGLang: the other side is a scripted server."""

import asyncio
import contextlib
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from headrace.common.wire import Sampling, Ticket
from headrace.generation.engine.client import Engine, EngineError, UnconfirmedWeights
from headrace.generation.engine.swaps import confirmation
from tests.support.fake_sglang import FakeSglang, a_fake_sglang, sample, server_info, sha256
from tests.support.guard import GUARD_S


@pytest.fixture
def fake() -> Iterator[FakeSglang]:
    with a_fake_sglang() as server:
        yield server


def ticket(num_completions: int = 1) -> Ticket:
    return Ticket(
        id="0-7",
        kind="train",
        prompt_tokens=[5, 6],
        messages=[],
        reference={},
        num_completions=num_completions,
        sampling=Sampling(temperature=1.0, max_new_tokens=8, stop_token_ids=[1]),
        min_weight_version=0,
    )


def generate(fake: FakeSglang, num_completions: int = 1, completion_timeout_s: float = GUARD_S) -> Any:
    async def run() -> Any:
        engine = Engine(fake.url, completion_timeout_s=completion_timeout_s)
        try:
            return await engine.generate(ticket(num_completions))
        finally:
            await engine.aclose()

    return asyncio.run(run())


def swap(fake: FakeSglang, *folders: Path, version: int = 4, **settings: Any) -> Any:
    """Swaps one engine to each of the folders in turn, the first as `version`; returns the last swap's timings."""

    async def run() -> Any:
        engine = Engine(fake.url, **{"swap_timeout_s": GUARD_S, **settings})
        try:
            return [await engine.swap(folder, version + place) for place, folder in enumerate(folders)][-1]
        finally:
            await engine.aclose()

    return asyncio.run(run())


def test_a_valid_reply_is_converted(fake: FakeSglang) -> None:
    fake.replies["/generate"] = (200, [sample()])
    [completion] = generate(fake)
    assert completion.tokens == [9, 1]
    assert completion.behaviour_logprobs.dtype == "float32"
    assert completion.behaviour_logprobs.tolist() == [-0.5, -0.25]
    assert [(span.version, span.start, span.end) for span in completion.version_spans] == [(3, 0, 1), (4, 1, 2)]
    assert (completion.finish_reason, completion.text) == ("stop", "x")


def spans(*edges: tuple[Any, int, int]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in edges]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"finish_reason": {"type": "abort", "message": "Aborted"}}, "finished with abort: Aborted"),
        ({"finish_reason": None}, "cannot be decoded"),
        ({"weight_versions": []}, "do not tile 2 tokens"),
        ({"weight_versions": spans(("3", 0, 1))}, "do not tile 2 tokens"),
        ({"weight_versions": spans(("3", 0, 1), ("4", 0, 2))}, "do not tile 2 tokens"),
        ({"weight_versions": spans(("3", 0, 3), ("4", 3, 2))}, "do not tile 2 tokens"),
        ({"weight_versions": spans(("3", 0, 0), ("4", 0, 2))}, "do not tile 2 tokens"),
        ({"weight_versions": spans(("default", 0, 2))}, "weight version 'default' is not a number"),
        ({"output_token_logprobs": [[-0.5, 9, None]]}, "1 log-probabilities"),
        ({"output_token_logprobs": [[-0.5, 9, None], [-0.25, 2, None]]}, "not those of the 2 tokens"),
        ({"output_token_logprobs": [[-0.5, 9, None], [None, 1, None]]}, "not finite"),
        ({"output_token_logprobs": "none"}, "cannot be decoded"),
    ],
)
def test_an_unusable_sample_names_ticket_and_problem(fake: FakeSglang, changes: dict[str, Any], problem: str) -> None:
    fake.replies["/generate"] = (200, [sample(**changes)])
    with pytest.raises(EngineError, match=rf"^ticket 0-7: .*{problem}"):
        generate(fake)


def test_a_wrong_number_of_completions_is_refused(fake: FakeSglang) -> None:
    fake.replies["/generate"] = (200, [sample()])
    with pytest.raises(EngineError, match="ticket 0-7: 1 completions, asked for 2"):
        generate(fake, num_completions=2)


def test_an_error_status_carries_the_engines_message(fake: FakeSglang) -> None:
    fake.replies["/generate"] = (500, {"error": {"message": "out of memory"}})
    with pytest.raises(EngineError, match=r"ticket 0-7: /generate answered 500: .*out of memory"):
        generate(fake)


def test_a_hanging_generate_is_aborted_at_its_deadline(fake: FakeSglang) -> None:
    fake.hanging.add("/generate")
    with pytest.raises(
        EngineError, match=r"ticket 0-7: the engine answered neither it nor another request within 0\.3 s"
    ):
        generate(fake, num_completions=2, completion_timeout_s=0.3)
    [(_, request)] = [call for call in fake.calls if call[0] == "/generate"]
    assert sorted(body["rid"] for path, body in fake.calls if path == "/abort_request") == sorted(request["rid"])


def test_no_server_is_an_engine_error() -> None:
    fake = FakeSglang()
    fake.server_close()
    with pytest.raises(EngineError, match=r"ticket 0-7: /generate at .*ClientConnectorError"):
        generate(fake)


@pytest.mark.parametrize("status", [200, 400])
def test_a_refused_update_raises_and_continues(fake: FakeSglang, tmp_path: Path, status: int) -> None:
    fake.replies["/update_weights_from_disk"] = (status, {"success": False, "message": "shapes differ"})
    with pytest.raises(EngineError, match=r"/update_weights_from_disk .*shapes differ"):
        swap(fake, tmp_path)
    assert fake.paths[-3:] == ["/pause_generation", "/update_weights_from_disk", "/continue_generation"]


@pytest.mark.parametrize("path", ["/pause_generation", "/update_weights_from_disk"])
def test_a_failing_step_of_a_swap_still_continues(fake: FakeSglang, tmp_path: Path, path: str) -> None:
    fake.replies[path] = (500, {"detail": "boom"})
    with pytest.raises(EngineError, match=f"{path} answered 500: .*boom"):
        swap(fake, tmp_path)
    assert fake.paths[-1] == "/continue_generation"


def test_a_hanging_update_ends_at_its_deadline_and_continues(fake: FakeSglang, tmp_path: Path) -> None:
    fake.hanging.add("/update_weights_from_disk")
    with pytest.raises(EngineError, match=r"/update_weights_from_disk at .*no answer within"):
        swap(fake, tmp_path, swap_timeout_s=1.0)
    assert fake.paths[-1] == "/continue_generation"


def test_a_swap_fails_if_the_engine_does_not_report_the_version(fake: FakeSglang, tmp_path: Path) -> None:
    fake.takes_weights = False
    with pytest.raises(EngineError, match="reports weight version 4 after a swap to 5"):
        swap(fake, tmp_path, version=5)
    timings = swap(fake, tmp_path, version=4)
    assert 0 < timings.load_s <= timings.pause_s <= timings.total_s


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three versions of three tensors, two of which the engine holds fused."""
    folders = [tmp_path / f"v{version}" for version in range(3)]
    for version, folder in enumerate(folders):
        folder.mkdir()
        names = ("model.norm.weight", "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight")
        tensors = {name: np.full(3 + place, version + place, np.float32) for place, name in enumerate(names)}
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folders


def test_an_engine_that_kept_its_weights_and_changed_its_label_is_detected(
    fake: FakeSglang, folders: list[Path]
) -> None:
    assert swap(fake, folders[0]).confirm_s > 0
    fake.keeps_tensors = True
    with pytest.raises(EngineError, match=r"version 5 after a swap to .*/v1, but it holds other bytes for 3 of 3 tens"):
        swap(fake, folders[1], version=5)
    assert fake.paths[-3:] == ["/continue_generation", "/model_info", "/weights_checker"], "the pause is over"


def test_fused_tensors_are_compared_too(fake: FakeSglang, folders: list[Path]) -> None:
    fake.keeps_tensors = True
    parts = [np.full(4, 1, np.float32), np.full(5, 2, np.float32)]
    fake.hold({"layers.0.mlp.gate_up_proj.weight": sha256(b"".join(part.tobytes() for part in parts))})
    swap(fake, folders[0])
    with pytest.raises(
        EngineError, match=r"other bytes for 1 of 1 tensors, layers\.0\.mlp\.gate_up_proj\.weight first"
    ):
        swap(fake, folders[1])


@pytest.mark.parametrize("tp_size", [1, 2])
def test_on_a_gpu_each_tensor_must_change_with_the_version(
    fake: FakeSglang, folders: list[Path], tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds for an engine's first swap, which is compared with the folder that it was started on."""
    monkeypatch.setattr(confirmation, "SAMPLE_BYTES", 0)
    fake.be_on_cuda()
    fake.replies["/server_info"] = 200, server_info(device="cuda", tp_size=tp_size)
    fake.model_path = folders[0]
    fake.take_weights(folders[0], "3")
    swap(fake, *folders)
    fake.take_weights(folders[0], "3")
    taken = fake.take_weights

    def take_one(folder: Path, label: str) -> None:
        before = dict(fake.held)
        taken(folder, label)
        fake.hold(fake.held | {name: before[name] for name in list(before)[1:]})

    monkeypatch.setattr(fake, "take_weights", take_one)
    with pytest.raises(EngineError, match=r"2 of its 3 tensors do not match: .* has not changed, but its bytes have"):
        swap(fake, folders[1])


def test_on_a_gpu_the_bytes_of_a_sample_are_compared_with_the_file(
    fake: FakeSglang, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The tensors have changed, but to other bytes; nothing was known of the engine before."""
    fake.be_on_cuda()
    fake.take_weights(folders[0], "3")
    with caplog.at_level("INFO"):
        swap(fake, *folders)
    assert (
        "0 of the engine's 3 tensors have each changed as the version's have; 3 are the file's bit for bit"
        in caplog.text
    )
    assert "3 of the engine's 3 tensors have each changed" in caplog.text
    fake.checksum = sha256
    with pytest.raises(EngineError, match=r"other bytes for 3 of 3 sampled tensors, .*must run in the dtype"):
        swap(fake, folders[1])


def test_a_first_swap_without_earlier_weights_logs_a_warning(
    fake: FakeSglang, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """An external engine with two ranks, whose earlier weights are gone; the second swap is compared."""
    fake.be_on_cuda()
    fake.replies["/server_info"] = 200, server_info(device="cuda", tp_size=2)
    fake.take_weights(folders[0], "3")
    with caplog.at_level("INFO"):
        swap(fake, *folders)
    told = [(record.levelname, record.message) for record in caplog.records]
    assert told == [
        ("WARNING", confirmation.LABEL_ONLY),
        ("INFO", "3 of the engine's 3 tensors have each changed as the version's have"),
    ]


@pytest.mark.parametrize("is_on_cuda", [True, False])
def test_on_a_gpu_no_file_is_opened_after_the_pause(
    fake: FakeSglang, folders: list[Path], is_on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are deleted once the engine has loaded them. On a CPU they are read after the pause."""
    if is_on_cuda:
        fake.be_on_cuda()
    fake.take_weights(folders[0], "3")
    taken = fake.take_weights

    def take_and_remove(folder: Path, label: str) -> None:
        taken(folder, label)
        shutil.rmtree(folder)

    monkeypatch.setattr(fake, "take_weights", take_and_remove)
    with contextlib.nullcontext() if is_on_cuda else pytest.raises(EngineError, match="is no longer in"):
        swap(fake, *folders)


def test_a_load_that_fails_halfway_refuses_requests_in_flight_and_later_ones(
    fake: FakeSglang, folders: list[Path]
) -> None:
    """The engine keeps the old label, but its weights are unknown until a swap is confirmed."""
    fake.replies["/generate"] = (200, [sample(weight_versions=spans(("4", 0, 2)))])

    async def scenario() -> None:
        engine = Engine(fake.url)
        await engine.swap(folders[0], 4)
        fake.delaying["/generate"] = answering = threading.Event()
        in_flight = asyncio.create_task(engine.generate(ticket()))
        while "/generate" not in fake.paths:
            await asyncio.sleep(0.01)
        fake.fails_halfway = True
        fake.delaying["/continue_generation"] = continuing = threading.Event()
        swapping = asyncio.create_task(engine.swap(folders[1], 5))
        while fake.paths[-1] != "/continue_generation":
            await asyncio.sleep(0.01)
        with pytest.raises(UnconfirmedWeights):  # generation is about to continue; no request may come before
            await engine.generate(ticket())
        continuing.set()
        with pytest.raises(EngineError, match="Rolling back"):
            await swapping
        answering.set()
        with pytest.raises(UnconfirmedWeights):
            await in_flight
        assert engine.has_unverified_weights and await engine.weight_version() == 4
        with pytest.raises(UnconfirmedWeights):
            await engine.generate(ticket())
        fake.fails_halfway = False
        await engine.swap(folders[1], 5)
        assert len(await engine.generate(ticket())) == 1
        await engine.aclose()

    asyncio.run(scenario())


def test_tokens_of_an_unconfirmed_version_are_refused(fake: FakeSglang, folders: list[Path]) -> None:
    """This includes a request that was in flight, even after a second swap to the version has been confirmed."""
    fake.replies["/generate"] = (200, [sample()])

    async def scenario() -> None:
        engine = Engine(fake.url)
        fake.delaying["/generate"] = answering = threading.Event()
        in_flight = asyncio.create_task(engine.generate(ticket()))
        while "/generate" not in fake.paths:
            await asyncio.sleep(0.01)
        fake.keeps_tensors = True
        fake.hold({"model.norm.weight": "stale"})
        with pytest.raises(EngineError, match="other bytes"):
            await engine.swap(folders[0], 4)
        del fake.delaying["/generate"]
        with pytest.raises(UnconfirmedWeights, match="may hold other weights than it reports"):
            await engine.generate(ticket())
        fake.keeps_tensors = False
        await engine.swap(folders[0], 4)
        answering.set()
        with pytest.raises(UnconfirmedWeights):
            await in_flight
        assert len(await engine.generate(ticket())) == 1
        await engine.aclose()

    asyncio.run(scenario())


def test_tokens_of_a_version_wait_until_it_is_confirmed(fake: FakeSglang, folders: list[Path]) -> None:
    fake.replies["/generate"] = (200, [sample()])

    async def scenario() -> None:
        engine = Engine(fake.url)
        await engine.swap(folders[0], 3)
        fake.calls.clear()
        fake.delaying["/weights_checker"] = confirming = threading.Event()
        swapping = asyncio.create_task(engine.swap(folders[1], 4))
        while "/weights_checker" not in fake.paths:
            await asyncio.sleep(0.01)
        assert engine.is_loading, "hashing has its own deadline and does not count as silence"
        request = asyncio.create_task(engine.generate(ticket()))
        while "/generate" not in fake.paths:
            await asyncio.sleep(0.01)
        done, _ = await asyncio.wait([request], timeout=0.3)
        assert not done
        confirming.set()
        await swapping
        assert len(await request) == 1
        await engine.aclose()

    asyncio.run(scenario())


def test_in_place_keeps_the_cache_and_requests_no_flush(fake: FakeSglang, tmp_path: Path) -> None:
    fake.replies["/server_info"] = 200, server_info(disable_overlap_schedule=True)
    for mode, flush_cache in (("retract", True), ("in_place", False)):
        fake.calls.clear()
        swap(fake, tmp_path, swap_mode=mode)
        assert dict(fake.calls)["/pause_generation"] == {"mode": mode}
        assert dict(fake.calls)["/update_weights_from_disk"]["flush_cache"] is flush_cache


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "has overlap schedule on, radix cache off, tp_size 1"),
        ({"disable_overlap_schedule": True, "disable_radix_cache": False}, "radix cache on"),
        ({"disable_overlap_schedule": True, "tp_size": 2}, "tp_size 2"),
    ],
)
def test_in_place_refuses_an_unsuitable_engine(
    fake: FakeSglang, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    fake.replies["/server_info"] = 200, server_info(**changes)
    with pytest.raises(EngineError, match=f"in_place needs an engine started with .*{problem}"):
        swap(fake, tmp_path, swap_mode="in_place")
    assert "/pause_generation" not in fake.paths
    swap(fake, tmp_path)


def test_a_cancelled_swap_continues_and_stays_cancelled(
    fake: FakeSglang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if continuing fails: its error must not replace the cancellation, or a drain would wait for ever."""
    monkeypatch.setattr("headrace.generation.engine.swaps.swapping.CANCELLED_CONTINUE_TIMEOUT_S", 1.0)
    fake.hanging = {"/update_weights_from_disk", "/continue_generation"}

    async def scenario() -> None:
        engine = Engine(fake.url)
        swapping = asyncio.create_task(engine.swap(tmp_path, 4))
        while fake.paths[-1:] != ["/update_weights_from_disk"]:
            await asyncio.sleep(0.01)
        assert engine.is_loading
        swapping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(swapping, GUARD_S)
        assert not engine.is_loading
        await engine.aclose()

    asyncio.run(scenario())
    assert fake.paths[-1] == "/continue_generation"


def test_only_replies_that_need_the_scheduler_are_signs_of_life(fake: FakeSglang, tmp_path: Path) -> None:
    fake.replies["/generate"] = (200, [sample()])
    heard: list[float] = []

    async def scenario() -> None:
        engine = Engine(fake.url)
        await engine.weight_version()
        heard.append(engine.last_heard_at)
        for call in (engine.generate(ticket()), engine.swap(tmp_path, 4), engine.health()):
            await call
            heard.append(engine.last_heard_at)
        fake.replies["/health"] = (503, {})
        assert not await engine.health()
        heard.append(engine.last_heard_at)
        await engine.aclose()

    asyncio.run(scenario())
    assert heard[0] == -math.inf and heard[0] < heard[1] < heard[2] < heard[3] == heard[4]


def test_an_engine_without_a_version_reports_none(fake: FakeSglang) -> None:
    fake.replies["/model_info"] = (200, {"model_path": "/nowhere", "weight_version": "default"})
    assert asyncio.run(Engine(fake.url).weight_version()) is None
