"""What `Engine` makes of faults that the real SGLang cannot be made to show: the other side is a scripted server."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.wire import Sampling, Ticket
from services.generation.engine import Engine, EngineError
from tests.fake_sglang import FakeSglang, a_fake_sglang, sample


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


def generate(fake: FakeSglang, num_completions: int = 1, request_timeout_s: float = 10.0) -> Any:
    async def run() -> Any:
        engine = Engine(fake.url, request_timeout_s=request_timeout_s)
        try:
            return await engine.generate(ticket(num_completions))
        finally:
            await engine.aclose()

    return asyncio.run(run())


def swap(fake: FakeSglang, folder: Path, version: int = 4, swap_timeout_s: float = 10.0) -> Any:
    async def run() -> Any:
        engine = Engine(fake.url, swap_timeout_s=swap_timeout_s)
        try:
            return await engine.swap(folder, version)
        finally:
            await engine.aclose()

    return asyncio.run(run())


def test_a_sound_reply_is_taken_whole(fake: FakeSglang) -> None:
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
    with pytest.raises(EngineError, match=r"ticket 0-7: no reply within 0\.3 s"):
        generate(fake, num_completions=2, request_timeout_s=0.3)
    [(_, request)] = [call for call in fake.calls if call[0] == "/generate"]
    assert sorted(body["rid"] for path, body in fake.calls if path == "/abort_request") == sorted(request["rid"])


def test_no_server_is_an_engine_error() -> None:
    fake = FakeSglang()
    fake.server_close()
    with pytest.raises(EngineError, match=r"ticket 0-7: /generate at .*ConnectError"):
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
    with pytest.raises(EngineError, match=r"/update_weights_from_disk at .*ReadTimeout"):
        swap(fake, tmp_path, swap_timeout_s=0.3)
    assert fake.paths[-1] == "/continue_generation"


def test_a_version_that_the_engine_does_not_report_is_no_success(fake: FakeSglang, tmp_path: Path) -> None:
    fake.takes_weights = False
    with pytest.raises(EngineError, match="reports weight version 4 after a swap to 5"):
        swap(fake, tmp_path, version=5)
    timings = swap(fake, tmp_path, version=4)
    assert 0 < timings.load_s <= timings.pause_s <= timings.total_s


def test_a_cancelled_swap_continues_and_stays_cancelled(
    fake: FakeSglang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where continuing fails, which must not take the cancellation's place: whoever drains would wait for ever."""
    monkeypatch.setattr("services.generation.engine.LAST_CONTINUE_TIMEOUT_S", 0.2)
    fake.hanging = {"/update_weights_from_disk", "/continue_generation"}

    async def scenario() -> None:
        engine = Engine(fake.url)
        swapping = asyncio.create_task(engine.swap(tmp_path, 4))
        while fake.paths[-1:] != ["/update_weights_from_disk"]:
            await asyncio.sleep(0.01)
        assert engine.is_loading
        swapping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(swapping, 5.0)
        assert not engine.is_loading
        await engine.aclose()

    asyncio.run(scenario())
    assert fake.paths[-1] == "/continue_generation"


def test_only_what_needs_the_scheduler_is_a_sign_of_life(fake: FakeSglang, tmp_path: Path) -> None:
    fake.replies["/generate"] = (200, [sample()])
    heard: list[float] = []

    async def scenario() -> None:
        engine = Engine(fake.url)
        await engine.weight_version()
        heard.append(engine.heard_at)
        for call in (engine.generate(ticket()), engine.swap(tmp_path, 4), engine.health()):
            await call
            heard.append(engine.heard_at)
        fake.replies["/health"] = (503, {})
        assert not await engine.health()
        heard.append(engine.heard_at)
        await engine.aclose()

    asyncio.run(scenario())
    assert heard[0] == -math.inf and heard[0] < heard[1] < heard[2] < heard[3] == heard[4]


def test_an_engine_without_a_version_says_so(fake: FakeSglang) -> None:
    fake.replies["/model_info"] = (200, {"model_path": "/nowhere", "weight_version": "default"})
    assert asyncio.run(Engine(fake.url).weight_version()) is None
