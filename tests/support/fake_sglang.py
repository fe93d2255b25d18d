"""A scripted server in SGLang's place, for faults that the real one cannot be made to show.

In this process as `FakeSglang`; as a process of its own, for an `EngineServer`, by `python -m tests.support.fake_sglang
PORT [VERSION]`. There `POST /script {"hanging": [paths], "burn_s": seconds, "fails_halfway": bool}` says what it does
from now on.
"""

import contextlib
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import safetensors

from headrace.generation.tensors.checksum import cuda_checksum
from tests.support.guard import GUARD_S

Json = dict[str, Any] | list[Any]


class ScriptedServer(ThreadingHTTPServer):
    """`closing` is set when it is to end."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.closing = threading.Event()


Scripted = TypeVar("Scripted", bound=ScriptedServer)


class FakeSglang(ScriptedServer):
    """Answers each path with `replies[path] = (status, body)`, one in `delaying` when its event is set; a path
    in `hanging` gets no answer, and one in `trickling` an answer without end."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), FakeHandler)
        self.replies: dict[str, tuple[int, Json]] = {
            "/health": (200, {}),
            "/pause_generation": (200, {"status": "ok"}),
            "/update_weights_from_disk": (200, {"success": True, "message": "ok"}),
            "/continue_generation": (200, {"status": "ok"}),
            "/abort_request": (200, {}),
            "/server_info": (200, server_info()),
            "/script": (200, {}),
        }
        self.parsers: dict[str, str | None] = {"tool_call_parser": None, "reasoning_parser": None}
        self.hanging: set[str] = set()
        self.model_path = Path("/nowhere")
        self.serve_version("4")
        self.trickling: set[str] = set()
        self.delaying: dict[str, threading.Event] = {}
        self.completes = True
        """Else tickets get no answer, but smaller requests do."""
        self.takes_weights = True
        self.keeps_tensors = False
        """It takes a new version's label, and not its tensors."""
        self.fails_halfway = False
        """It takes half of a version's tensors, keeps its label, and says that it has rolled back."""
        self.checksum: Callable[[bytes], str] = sha256
        self.held: dict[str, str] = {}
        self.hold({})
        self.calls: list[tuple[str, Any]] = []
        self.cached: list[list[int]] = []
        """Prompts of turns with their replies, since the last new weights."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def serve_version(self, label: str) -> None:
        info = {"model_path": str(self.model_path), "weight_version": label}
        self.replies["/model_info"] = 200, info | self.parsers

    def have_parsers(self, tool_call_parser: str | None = None, reasoning_parser: str | None = None) -> None:
        self.parsers = {"tool_call_parser": tool_call_parser, "reasoning_parser": reasoning_parser}
        self.serve_version(self.replies["/model_info"][1]["weight_version"])  # type: ignore[call-overload]

    def reply_to(self, path: str, body: Any) -> tuple[int, Json]:
        parsers = {"/parse_function_call": parse_calls, "/separate_reasoning": separate_reasoning}
        if path in parsers and path not in self.replies:
            return 200, parsers[path](body)
        status, reply = self.replies.get(path, (404, {"detail": "Not Found"}))
        if status == 200 and path == "/generate" and isinstance(body.get("rid"), str):
            return status, self.sample_turn(body["input_ids"], reply[0] if isinstance(reply, list) else reply)
        if status == 200 and path == "/update_weights_from_disk" and self.takes_weights:
            return self.take_weights(Path(body["model_path"]), body["weight_version"]) or (status, reply)
        return status, reply

    def sample_turn(self, prompt: list[int], sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with the numbers of tokens that belong to the prompt."""
        cached = max((num_common(known, prompt[:-1]) for known in self.cached), default=0)
        self.cached.append(prompt + sample["output_ids"])
        counts = {"prompt_tokens": len(prompt), "cached_tokens": cached}
        return sample | {"meta_info": counts | sample["meta_info"]}

    def be_on_cuda(self) -> None:
        self.replies["/server_info"] = 200, server_info(device="cuda")
        self.checksum = cuda_checksum

    def hold(self, *ranks: dict[str, str]) -> None:
        self.held = ranks[0]
        self.replies["/weights_checker"] = 200, {"success": True, "ranks": [{"checksums": rank} for rank in ranks]}

    def take_weights(self, folder: Path, label: str) -> tuple[int, Json] | None:
        """Its reply, where that is none of success."""
        files = [safetensors.deserialize(path.read_bytes()) for path in folder.glob("*.safetensors")]
        taken = {name: self.checksum(bytes(tensor["data"])) for file in files for name, tensor in file}
        if self.fails_halfway:
            self.hold(self.held | dict(sorted(taken.items())[: len(taken) // 2]))
            message = "Failed to update weights: no such tensor.\nRolling back to original weights."
            return 400, {"success": False, "message": message}
        self.serve_version(label)
        self.cached.clear()
        if not self.keeps_tensors:
            self.hold(taken)
        return None

    def follow_script(self, hanging: Collection[str] = (), burn_s: float = 0.0, fails_halfway: bool = False) -> None:
        self.hanging = set(hanging)
        self.fails_halfway = fails_halfway
        burning_until = time.monotonic() + burn_s
        while time.monotonic() < burning_until:
            pass


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeSglang

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        self.server.calls.append((self.path, body))
        is_ticket = self.path == "/generate" and "return_logprob" in body
        if self.path in self.server.hanging or (is_ticket and not self.server.completes):
            self.server.closing.wait(GUARD_S)
            return
        if self.path in self.server.trickling:
            self.trickle()
            return
        if self.path in self.server.delaying:
            self.server.delaying[self.path].wait(GUARD_S)
        status, reply = self.server.reply_to(self.path, body)
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        if self.path == "/script":
            self.server.follow_script(**body)

    def trickle(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side has had enough
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"{")

    def log_message(self, *_: Any) -> None:
        pass


def a_fake_sglang() -> contextlib.AbstractContextManager[FakeSglang]:
    return in_a_thread(FakeSglang())


@contextlib.contextmanager
def in_a_thread(server: Scripted) -> Iterator[Scripted]:
    """Serves until the block ends; whatever hangs sees `closing`."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def server_info(**changes: Any) -> dict[str, Any]:
    return {"device": "cpu", "tp_size": 1, "disable_overlap_schedule": False, "disable_radix_cache": True} | changes


def num_common(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def parse_calls(body: dict[str, Any]) -> dict[str, Any]:
    """As SGLang's parser `hermes`: where any JSON is broken, there is no call."""
    text: str = body["text"]
    try:
        found = [json.loads(written) for written in re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", text, re.DOTALL)]
    except ValueError:
        return {"normal_text": text, "calls": []}
    calls = [{"tool_index": 0, "name": call["name"], "parameters": json.dumps(call["arguments"])} for call in found]
    return {"normal_text": text.split("<tool_call>")[0].strip() if found else text, "calls": calls}


def separate_reasoning(body: dict[str, Any]) -> dict[str, Any]:
    """As SGLang's parser `qwen3`."""
    text: str = body["text"]
    if "<think>" not in text:
        return {"reasoning_text": "", "text": text}
    reasoning, _, content = text.removeprefix("<think>").partition("</think>")
    return {"reasoning_text": reasoning, "text": content}


def sha256(payload: bytes) -> str:
    """As SGLang on a CPU tells it of a tensor."""
    return hashlib.sha256(payload).hexdigest()[:16]


def sample(**changes: Any) -> dict[str, Any]:
    """A sound sample of two tokens; `changes` replace entries of its `meta_info`."""
    meta = {
        "finish_reason": {"type": "stop", "matched": 1},
        "output_token_logprobs": [[-0.5, 9, None], [-0.25, 1, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
    }
    return {"text": "x", "output_ids": [9, 1], "meta_info": meta | changes}


if __name__ == "__main__":
    engine = FakeSglang(int(sys.argv[1]))
    if len(sys.argv) > 2:
        engine.serve_version(sys.argv[2])
    engine.serve_forever(poll_interval=0.01)
