"""`headrace try` plays with the parts of a replica, prints the conversations, and leaves no process behind."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from headrace.common.config import RunConfig
from headrace.common.tasks import Split
from headrace.launcher.run.errors import ControlFailed
from headrace.launcher.trial.command import NO_TOKENS, try_recipe
from headrace.launcher.trial.endpoint import find_endpoint
from tests.support.fake_sglang import FakeSglang, ScriptedServer, in_a_thread, sample
from tests.support.guard import GUARD_S

ROOT = Path(__file__).parents[2]
Body = dict[str, Any]


class RemoteModel(ScriptedServer):
    """An OpenAI-compatible endpoint. The first of `says` whose key stands in the last message is the answer's message;
    a status is answered as an error. With `is_hanging` it gives no answer until it is closed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RemoteHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.says: dict[str, Body | int] = {"": {"content": "hm"}}
        self.models = ["one"]
        self.models_status = 200
        self.is_hanging = False
        self.has_request = threading.Event()
        self.bodies: list[Body] = []
        self.keys: list[str] = []


class RemoteHandler(BaseHTTPRequestHandler):
    server: RemoteModel

    def do_GET(self) -> None:
        self.answer(self.server.models_status, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("Authorization", ""))
        self.server.has_request.set()
        if self.server.is_hanging:
            self.server.closing.wait(GUARD_S)
            return
        last = body["messages"][-1]["content"]
        said = next(said for key, said in self.server.says.items() if key in last)
        if isinstance(said, int):
            self.answer(said, {"error": {"message": "too many requests"}})
            return
        message = {"role": "assistant", "content": "", **said}
        reason = "tool_calls" if "tool_calls" in said else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        self.answer(200, {"choices": [choice], "usage": {"completion_tokens": 3}})

    def answer(self, status: int, body: Body) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def remote() -> Iterator[RemoteModel]:
    with in_a_thread(RemoteModel()) as server:
        yield server


def config_of(model: str | Path, task: str, does: list[str], engine: str | None = None, **settings: Any) -> RunConfig:
    sections = {
        "model": {"path": str(model), "dtype": "float32"},
        "task": {"name": f"tests.support.chatty_tasks:{task}", "settings": {"does": does, **settings}},
        "sampling": {"max_new_tokens": 8},
        "generation": {"engine": {"url": engine, "device": "cpu"}},
        **({"environment": {"max_turns": 3}} if task == "Chatty" else {}),
    }
    return RunConfig.model_validate(sections)


def tried(config: RunConfig, url: str | None = None, split: Split = "train", num: int = 4) -> tuple[bool, str]:
    console = Console(record=True, width=200, file=io.StringIO())
    is_good = try_recipe(config, console, split, num, url, None)
    return is_good, console.export_text()


def test_episodes_are_printed_with_what_would_be_recorded(fake: FakeSglang, demo_policy: Path) -> None:
    fake.replies["/generate"] = 200, [sample() | {"text": "hm"}]
    is_good, text = tried(config_of(demo_policy, "Chatty", ["goes on", "raises", "rewrites"], fake.url))
    assert not is_good
    goes_on, raises, rewrites = text.split("\n1. ")[1].replace("\n2. ", "\n3. ").split("\n3. ")
    assert goes_on.count("assistant  2 tokens, ") == 3 and goes_on.count("user\n   Go on.") == 2
    assert "reward 0.500, turns 3.5, ended by the limit of turns\n" in goes_on
    assert "3 turns, 1 segment, 6 sampled tokens, " in goes_on and " s in the environment" in goes_on
    assert "user\n   Begin.\n   assistant" in raises
    assert "failed: RuntimeError: no board for hm (" in raises and "chatty_tasks.py:" in raises
    assert "──── segment 2: history rewritten by the agent ────\n   (1 message as above)\n" in rewrites
    assert "2 turns, 2 segments, 4 sampled tokens, 0 of the environment" in rewrites
    assert "\n3 episodes: reward 0.500 in the mean, 0.50 to 0.50, 1 failed\n" in text


def test_an_engine_that_does_not_answer_is_said_at_once(demo_policy: Path) -> None:
    with pytest.raises(ControlFailed, match=r"/model_info at http://127\.0\.0\.1:1: "):
        tried(config_of(demo_policy, "Chatty", ["good"], "http://127.0.0.1:1"))


def test_completions_are_scored(fake: FakeSglang, demo_policy: Path) -> None:
    fake.replies["/generate"] = 200, [sample() | {"text": "hmm"}]
    is_good, text = tried(config_of(demo_policy, "Scored", ["good"], fake.url))
    assert is_good
    assert "user\n   Begin.\n   assistant  2 tokens, " in text and "\n   hmm\n   reward 3.000\n" in text
    assert "\n1 completion: reward 3.000 in the mean" in text


def test_an_endpoint_plays_episodes_without_the_model(remote: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"place": "box"}'}}
    remote.says = {
        "Begin.": {"content": "hm", "tool_calls": [call]},
        "nothing in box": {"content": "I see"},
        "refused": 429,
        "": {"content": "hm"},
    }
    config = config_of("no/such-model", "Chatty", ["tools", "goes on", "refused"], has_tools=True)
    is_good, text = tried(config, remote.url, "held_out")
    assert not is_good and "/v1/chat/completions answered 429: " in text and ", 1 failed" in text
    assert "played by one at http://127.0.0.1:" in text
    assert "tool\n   nothing in box\n   assistant" in text and "\n   I see\n   reward 0.500" in text
    assert "reward 0.500, turns 3.5, ended by the limit of turns\n   3 turns, " in text and NO_TOKENS in text
    assert set(remote.keys) == {"Bearer sk-mine"}
    sent = next(body["messages"] for body in remote.bodies if body["messages"][-1]["role"] == "tool")
    assert sent[1]["tool_calls"] == [call], "as the endpoint had sent it"


def test_what_is_asked_for_wrongly_is_refused_in_one_line(remote: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"--url 'localhost:1': expected the URL of an OpenAI-compatible endpoint"):
        find_endpoint("localhost:1", None)
    remote.models = ["one", "two"]
    with pytest.raises(ValueError, match="expected --model with the name of a model there; it has one, two"):
        find_endpoint(f"{remote.url}/v1/", None)
    assert find_endpoint(remote.url, "two") == (f"{remote.url}/v1", "two")
    remote.models_status = 401
    with pytest.raises(ValueError, match="answered 401; expected its key in OPENAI_API_KEY"):
        find_endpoint(remote.url, "two")
    with pytest.raises(ValueError, match="--model 'm': expected --url too"):
        try_recipe(config_of("m", "Chatty", []), Console(), "train", 1, None, "m")
    remote.models_status = 200
    with pytest.raises(ValueError, match="it has no train prompts"):
        try_recipe(config_of("m", "Chatty", []), Console(), "train", 1, remote.url, "two")


def test_an_endpoint_that_is_gone_is_said_in_one_line(remote: RemoteModel) -> None:
    remote.shutdown()
    remote.server_close()
    with pytest.raises(ValueError, match=r"--url '.*' does not answer: ConnectError") as caught:
        find_endpoint(remote.url, "one")
    assert "\n" not in str(caught.value)


def test_ctrl_c_ends_every_process(remote: RemoteModel, tmp_path: Path) -> None:
    remote.is_hanging = True
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config_of("m", "Chatty", ["good"]).model_dump_json(exclude_unset=True))
    command = [sys.executable, "-m", "headrace.launcher", "try", str(recipe), "--url", remote.url]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
        assert remote.has_request.wait(GUARD_S)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 2, "the process that plays, and a worker"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=GUARD_S)
    _, alive = psutil.wait_procs(started, timeout=GUARD_S)
    assert not alive and process.returncode not in (0, None)
