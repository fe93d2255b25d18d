"""What `Engine` makes of faults that the real SGLang cannot be made to show: the other side is a scripted server."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from common.wire import Sampling, Ticket
from services.generation.engine import Engine, EngineError

Json = dict[str, Any] | list[Any]


class FakeSglang(ThreadingHTTPServer):
    """Answers each path with `replies[path] = (status, body)`; a path in `hanging` gets no answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.replies: dict[str, tuple[int, Json]] = {
            "/pause_generation": (200, {"status": "ok"}),
            "/update_weights_from_disk": (200, {"success": True, "message": "ok"}),
            "/continue_generation": (200, {"status": "ok"}),
            "/model_info": (200, {"model_path": "/nowhere", "weight_version": "4"}),
            "/abort_request": (200, {}),
        }
        self.hanging: set[str] = set()
        self.closing = threading.Event()
        self.calls: list[tuple[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeSglang

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((self.path, json.loads(body) if body else None))
        if self.path in self.server.hanging:
            self.server.closing.wait(30.0)
            return
        status, reply = self.server.replies.get(self.path, (404, {"detail": "Not Found"}))
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[FakeSglang]:
    server = FakeSglang()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


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


def sample(**changes: Any) -> dict[str, Any]:
    """A sound sample of two tokens; `changes` replace entries of its `meta_info`."""
    meta = {
        "finish_reason": {"type": "stop", "matched": 1},
        "output_token_logprobs": [[-0.5, 9, None], [-0.25, 1, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
    }
    return {"text": "x", "output_ids": [9, 1], "meta_info": meta | changes}


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
    with pytest.raises(EngineError, match="reports weight version 4 after a swap to 5"):
        swap(fake, tmp_path, version=5)
    timings = swap(fake, tmp_path, version=4)
    assert 0 < timings.load_s <= timings.pause_s <= timings.total_s


def test_an_engine_without_a_version_says_so(fake: FakeSglang) -> None:
    fake.replies["/model_info"] = (200, {"model_path": "/nowhere", "weight_version": "default"})
    assert asyncio.run(Engine(fake.url).weight_version()) is None
