"""The server process: its start and end, after which no process is left. Other programs stand in for SGLang."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.common.config import EngineConfig, EnvironmentConfig
from headrace.common.preflight.recipe import check_engine_installed
from headrace.generation.engine.client import EngineError
from headrace.generation.engine.command import launch_command, launch_environment
from headrace.generation.engine.server import EngineServer
from tests.support.guard import GUARD_S

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"])
time.sleep(600)
"""

REPLICA = """
import asyncio, sys
from pathlib import Path
from headrace.common.config import EngineConfig
from headrace.generation.engine.server import EngineServer
server = EngineServer(EngineConfig(device="cpu"), "float32", Path(sys.argv[2]))
asyncio.run(server.start(sys.argv[1], 1))
"""


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + GUARD_S
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def server_running(
    program: list[str], monkeypatch: pytest.MonkeyPatch, log_path: Path, timeout_s: float = GUARD_S
) -> EngineServer:
    """An `EngineServer` that starts `program` instead of SGLang."""
    monkeypatch.setattr("headrace.generation.engine.server.launch_command", lambda *_: program)
    return EngineServer(EngineConfig(device="cpu", startup_timeout_s=timeout_s), "float32", log_path)


def test_an_early_death_is_reported_with_the_end_of_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "import sys; print('line one'); print('cannot allocate the cache', file=sys.stderr); sys.exit(7)"
    server = server_running([sys.executable, "-c", script], monkeypatch, tmp_path / "sglang.log")
    with pytest.raises(EngineError, match=r"(?s)exited with 7 .*the end of .*cannot allocate the cache"):
        asyncio.run(server.start("model", 1))
    assert server.returncode == 7
    assert not server.is_alive


def test_stop_ends_a_server_and_its_children_that_ignore_sigterm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    monkeypatch.setattr("headrace.generation.engine.server.STOP_GRACE_S", 0.3)
    server = server_running([sys.executable, str(script)], monkeypatch, tmp_path / "sglang.log")
    others = set(psutil.Process().children(recursive=True))
    seen: set[psutil.Process] = set()

    async def start_and_watch() -> None:
        start = asyncio.create_task(server.start("model", 1))
        while len(seen) < 2:
            seen.update(set(psutil.Process().children(recursive=True)) - others)
            await asyncio.sleep(0.05)
        start.cancel()
        await start

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(start_and_watch())
    assert len(seen) == 2
    assert not any(process.is_running() for process in seen)
    assert server.returncode == -signal.SIGKILL


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import time; time.sleep(600)"]
    server = server_running(program, monkeypatch, tmp_path / "sglang.log", timeout_s=0.3)
    with pytest.raises(EngineError, match=r"not healthy within 0\.3 s"):
        asyncio.run(server.start("model", 1))
    assert not server.is_alive


@pytest.mark.slow
def test_the_real_server_dies_with_a_killed_replica(demo_policy: Path, tmp_path: Path) -> None:
    """The replica is killed right after SGLang has forked its children."""
    command = [sys.executable, "-c", REPLICA, str(demo_policy), str(tmp_path / "sglang.log")]
    replica = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    family = psutil.Process(replica.pid)
    try:
        assert eventually(lambda: len(family.children(recursive=True)) >= 3)
        descendants = family.children(recursive=True)
    finally:
        replica.send_signal(signal.SIGKILL)
        replica.wait()
    assert eventually(lambda: not any(process.is_running() for process in descendants))


def test_a_missing_sglang_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^SGLang is not installed here[^\n]*$"):
        check_engine_installed()


def test_extra_arguments_come_last_and_cuda_runs_the_plain_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADRACE_TOKEN", "HEADRACE_REDIS_URL", "REDIS_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    settings = EngineConfig(device="cuda", extra_args=["--log-level", "info"])
    command = launch_command(settings, "bfloat16", "org/model", None, 1234)
    assert command[1:3] == ["-m", "sglang.launch_server"]
    assert command[-2:] == ["--log-level", "info"]
    assert "--weight-version" not in command and "--mem-fraction-static" not in command
    environment = launch_environment(settings)
    assert "secret" not in environment.values()
    ours = {name: value for name, value in os.environ.items() if value != "secret"}
    assert environment == ours | {"SGLANG_RETURN_ORIGINAL_LOGPROB": "0", "SGLANG_FORWARD_UNKNOWN_TOOLS": "1"}
    assert "secret" not in launch_environment(EngineConfig(device="cpu")).values()


def value_of(flag: str, command: list[str]) -> str | None:
    """The argument's value; None if it is missing. It may not occur twice."""
    assert command.count(flag) <= 1
    return command[command.index(flag) + 1] if flag in command else None


def test_settings_reach_the_server_as_its_arguments() -> None:
    settings = EngineConfig(
        device="cuda", tp_size=4, context_tokens=4096, max_running_requests=700, memory_fraction=0.5
    )
    command = launch_command(settings, "bfloat16", "m", 1, 1)
    assert value_of("--tp-size", command) == "4" and value_of("--context-length", command) == "4096"
    assert value_of("--mem-fraction-static", command) == "0.5"
    assert value_of("--cuda-graph-max-bs-decode", command) == value_of("--max-running-requests", command) == "700"
    on_cpu = launch_command(EngineConfig(device="cpu"), "float32", "m", 1, 1)
    assert not {"--tp-size", "--context-length", "--cuda-graph-max-bs-decode"} & {*on_cpu}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_logits_are_float32_whatever_the_models_dtype(device: Any) -> None:
    """The learner's are, too: on one side alone they would make the two disagree more."""
    for dtype, is_asked_for in (("bfloat16", True), ("float32", False)):
        command = launch_command(EngineConfig(device=device), dtype, "m", 1, 1)
        assert ("--enable-fp32-lm-head" in command) == is_asked_for


def test_an_engine_on_the_cpu_sees_no_gpu_and_all_report_logprobs_after_the_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    on_cpu, on_cuda = (launch_environment(EngineConfig(device=device)) for device in ("cpu", "cuda"))
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == "" and on_cuda["CUDA_VISIBLE_DEVICES"] == "3"
    assert on_cpu["SGLANG_RETURN_ORIGINAL_LOGPROB"] == on_cuda["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "0"


def test_the_launch_arguments_follow_from_the_swap_mode() -> None:
    needed = {"--disable-overlap-schedule", "--disable-radix-cache"}
    for device in ("cpu", "cuda"):
        assert needed <= {*launch_command(EngineConfig(device=device, swap_mode="in_place"), "float32", "m", 1, 1)}
    assert not needed & {*launch_command(EngineConfig(device="cuda"), "float32", "m", 1, 1)}


@pytest.mark.parametrize(
    ("settings", "is_on", "is_on_in_episodes"),
    [
        ({"device": "cpu"}, False, True),
        ({"device": "cuda"}, True, True),
        ({"device": "cpu", "prefix_cache": True}, True, True),
        ({"device": "cuda", "prefix_cache": False}, False, False),
        ({"device": "cuda", "swap_mode": "in_place"}, False, False),
    ],
)
def test_prefixes_are_cached_where_that_is_exact_and_helps(
    settings: dict[str, Any], is_on: bool, is_on_in_episodes: bool
) -> None:
    for environment, expected in ((None, is_on), (EnvironmentConfig(), is_on_in_episodes)):
        command = launch_command(EngineConfig(**settings), "float32", "m", 1, 1, environment)
        assert ("--disable-radix-cache" not in command) == expected


def test_parsers_and_template_reach_the_engine_of_a_task_with_rollout() -> None:
    named = EnvironmentConfig(tool_call_parser="hermes")
    command = launch_command(EngineConfig(device="cpu"), "float32", "m", 1, 1, named, "template.jinja")
    assert value_of("--tool-call-parser", command) == "hermes"
    assert value_of("--reasoning-parser", command) == "auto"
    assert value_of("--chat-template", command) == "template.jinja"
    command = launch_command(EngineConfig(device="cpu"), "float32", "m", 1, 1, None, "template.jinja")
    assert not {"--tool-call-parser", "--reasoning-parser", "--chat-template"} & {*command}


def test_the_servers_temporary_files_are_deleted_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SGLang leaves its sockets."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = "import sys, tempfile; open(tempfile.mkstemp()[1]); sys.exit(7)"
    server = server_running([sys.executable, "-c", script], monkeypatch, tmp_path / "sglang.log")
    with pytest.raises(EngineError, match="exited with 7"):
        asyncio.run(server.start(tmp_path, None))
    assert [path.name for path in tmp_path.iterdir()] == ["sglang.log"]
