"""Fixtures that several test modules share: the demo policy and the one real SGLang server of a test session."""

import asyncio
import functools
import json
import os
import re
import shutil
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from headrace.common.config import EngineConfig, EnvironmentConfig
from headrace.common.hardware.device import has_gpu
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.generation.engine.server import EngineServer
from tests.support.fake_sglang import FakeSglang, a_fake_sglang, sample
from tests.support.redis_servers import as_launched

FIRST_VERSION = 1
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
"""Tests, and all that they start, use the CPU whatever GPU is here."""


def pytest_report_header() -> str:
    if not has_gpu():
        return ""
    return "the tests use no GPU; with one: headrace up with device: auto, benchmarks/learner/gpu_learner.sh"


@pytest.fixture(scope="session")
def demo_policy() -> Path:
    return Path(__file__).parents[1] / "headrace" / "demo" / "policy"


@pytest.fixture
def fake() -> Iterator[FakeSglang]:
    """In SGLang's place: it answers every ticket of two completions."""
    with a_fake_sglang() as server:
        server.replies["/generate"] = (200, [sample(), sample()])
        yield server


@pytest.fixture(scope="session")
def engine_server(demo_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """The real SGLang on a CPU, started by the first test that needs it; its weights change as tests swap them.

    It is the engine of a task with `rollout`, with a prefix cache. Its generation config must not matter.
    """
    folder = tmp_path_factory.mktemp("sglang")
    shutil.copytree(demo_policy, folder / "policy")
    generation_config = folder / "policy" / "generation_config.json"
    misleading = {"top_k": 1, "temperature": 0.01, "repetition_penalty": 2.0}
    generation_config.write_text(json.dumps(json.loads(generation_config.read_text()) | misleading))
    server = EngineServer(EngineConfig(device="cpu"), "float32", folder / "sglang.log", environment=EnvironmentConfig())
    children_before = set(psutil.Process().children())
    asyncio.run(server.start(folder / "policy", FIRST_VERSION))
    started = [child for child in psutil.Process().children(recursive=True) if child not in children_before]
    yield server
    asyncio.run(server.stop())
    assert len(started) >= 3, f"expected the server, its scheduler and its detokenizer, saw {started}"
    assert not [process for process in started if process.is_running()], "the server left processes behind"


@pytest.fixture(scope="session")
def engine_url(engine_server: EngineServer) -> str:
    return engine_server.url


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis-compatible server, as `headrace up` starts it, one per test session."""
    with as_launched(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.replay import make_recording

    return make_recording(tmp_path_factory.mktemp("recording") / "recording.msgpack")


@pytest.fixture
def keys() -> Keys:
    """Of a run that no other test has."""
    return Keys(f"test-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    connection = connect(redis_url)
    yield connection
    connection.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs, which take longest, come first."""
    items.sort(key=lambda item: item.path.parent.name != "whole")


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """One process runs a file, and one runs all files that use the session's engine, which then starts once."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        return "engine" if uses_engine(file) else file


@functools.cache
def uses_engine(file: str) -> bool:
    text = (Path(__file__).parents[1] / file).read_text()
    return re.search(r"\bengine_(server: EngineServer|url: str[,)])", text) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    return FileScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that was skipped for want of a part is a failure."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
    return report
