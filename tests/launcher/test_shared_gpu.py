"""One GPU for learner and engine: each has its share whichever of them is started again beside the other."""

import asyncio
import os
import re
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
import torch

from headrace.common.config import EngineConfig, load_recipe
from headrace.common.hardware import device
from headrace.common.hardware.placement import MIB, engine_static_bytes
from headrace.common.process.waiting import Reason, Waits
from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, ReplicaState, encode
from headrace.generation.assembly import assemble_replica
from headrace.generation.engine.client import EngineError
from headrace.generation.engine.server import EngineServer
from headrace.generation.engine.shared_gpu import settings_beside_learner
from headrace.learner import __main__ as learner_process
from headrace.learner.distributed import engine_wait
from headrace.learner.distributed.ranks import Ranks
from headrace.learner.training import leader
from headrace.learner.training.leader import set_up_torch
from tests.support.fake_gpus import GIB, FakeGpus
from tests.support.fake_services import until
from tests.support.guard import GUARD_S

SETTINGS = EngineConfig(device="cuda", extra_args=["--log-level", "info"])
ENGINES = engine_static_bytes(24 * GIB, 0.5, 256)
"""Bytes for weights and KV cache beside a learner with half of 24 GiB."""


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    """One of 24 GiB."""
    fake = FakeGpus(tmp_path, 1, gib=24)
    monkeypatch.setattr(device, "DEVICE_FILES", fake.files)
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return fake


@pytest.mark.parametrize("free_mib", [24 * 1024, 23 * 1024, 12 * 1024, 10 * 1024])
def test_an_engine_gets_the_same_bytes_whatever_the_learner_holds(gpu: FakeGpus, free_mib: int) -> None:
    """SGLang takes its fraction of what is free."""
    gpu.tell((24 * 1024, free_mib))
    settings = settings_beside_learner(SETTINGS, 0.5)
    assert settings.memory_fraction is not None and settings.memory_fraction < 1
    assert settings.memory_fraction * free_mib * MIB == pytest.approx(ENGINES, rel=1e-3)
    assert settings.extra_args == ["--chunked-prefill-size", "2048", "--log-level", "info"]


def test_an_engine_that_cannot_have_its_share_says_so(gpu: FakeGpus) -> None:
    gpu.tell((24 * 1024, 6 * 1024))
    share = f"the engine's share beside learner.memory_fraction 0.5 is {ENGINES // MIB} MiB"
    line = f"GPU 0 has 6144 of 24576 MiB free, and {share}"
    with pytest.raises(EngineError, match=re.escape(line)):
        settings_beside_learner(SETTINGS, 0.5)
    gpu.query.unlink()
    with pytest.raises(EngineError, match="expected one GPU with memory reported by nvidia-smi"):
        settings_beside_learner(SETTINGS, 0.5)


def test_the_share_is_reckoned_at_each_start(gpu: FakeGpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of an engine that is started again beside a learner which has its own by then."""
    given: list[float | None] = []

    def launch_command(settings: EngineConfig, *_: object) -> list[str]:
        given.append(settings.memory_fraction)
        return [sys.executable, "-c", ""]

    monkeypatch.setattr("headrace.generation.engine.server.launch_command", launch_command)
    server = EngineServer(SETTINGS, "bfloat16", tmp_path / "sglang.log", learner_fraction=0.5)
    for free_gib in (24, 12):
        gpu.tell((24 * 1024, free_gib * 1024))
        with pytest.raises(EngineError, match="exited with 0"):
            asyncio.run(server.start(tmp_path, None))
    assert given == [pytest.approx(ENGINES / GIB / 24, rel=1e-3), pytest.approx(ENGINES / GIB / 12, rel=1e-3)]


def test_both_services_do_as_they_are_told_of_sharing(
    redis_url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = load_recipe(Path("configs/tiny-cpu.yaml"), ["learner.memory_fraction=0.6"]).config
    done: list[str] = []

    def learn(*_: object) -> int:
        done.append("learns")
        return 0

    monkeypatch.setattr(learner_process, "wait_for_engine", lambda *_: done.append("waits"))
    monkeypatch.setattr(learner_process, "_learn", learn)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    async def fraction_of_engine(is_shared: bool) -> float | None:
        replica = ("r", "http://127.0.0.1:1", tmp_path, Waits())
        async with assemble_replica(config, keys, redis_url, "token", *replica, shares_gpu=is_shared) as found:
            assert found.supervisor.server is not None
            return found.supervisor.server.learner_fraction

    for sharing in ([], ["--shares-gpu"]):
        given = ["learner", "--run", keys.run, "--runs-folder", str(tmp_path), "--redis-url", redis_url, *sharing]
        monkeypatch.setattr(sys, "argv", given)
        assert learner_process._run(learner_process._parse_arguments(), config, None, None) == 0
        assert asyncio.run(fraction_of_engine(bool(sharing))) == (0.6 if sharing else None)
    assert done == ["learns", "waits", "learns"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:b"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:b"}),
    ],
)
def test_the_learners_memory_does_not_fragment_unless_its_caller_has_chosen(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], chosen: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    learner_process._prepare_torch()
    assert os.environ == {"OMP_WAIT_POLICY": "PASSIVE"} | chosen


def test_the_learner_is_held_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: held.append((share, index)))
    recipe = load_recipe(Path("configs/tiny-cpu.yaml"), ["learner.memory_fraction=0.6"]).config
    set_up_torch(recipe, Ranks())
    assert held == [], "on a CPU there is nothing to hold"
    monkeypatch.setattr(leader, "pick_device", lambda _: SimpleNamespace(type="cuda"))
    set_up_torch(recipe, Ranks())
    assert held == [(0.6, 0)]


def heartbeat(state: ReplicaState, reason: str) -> bytes:
    waits = {"engine_starting": 3.0} if reason.startswith("the engine is starting") else {}
    return encode(Heartbeat("generation-0", "http://127.0.0.1:1", state, reason, 0, 0, 0, 0, 0.0, 0.0, waits=waits))


def is_last(seen: list[str], wanted: str) -> bool:
    return seen[-1:] == [wanted]


class Learner:
    """One that waits for the engine on its GPU."""

    def __init__(self, client: redis.Redis, keys: Keys, deadline_s: float = GUARD_S) -> None:
        self.waits, self.stop = Waits(), threading.Event()
        arguments = (client, keys, self.waits, self.stop, deadline_s)
        self.thread = threading.Thread(target=engine_wait.wait_for_engine, args=arguments)
        self.thread.start()

    def has_begun(self) -> bool:
        return not self.thread.is_alive()


def test_the_learner_waits_until_the_engine_has_its_share(
    client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_wait, "POLL_S", 0.01)
    looked_at: list[str] = []
    has_engine = engine_wait._has_engine

    def look(replica: Heartbeat) -> bool:
        looked_at.append(replica.reason)
        return has_engine(replica)

    monkeypatch.setattr(engine_wait, "_has_engine", look)
    learner = Learner(client, keys)
    until(lambda: learner.waits.is_waiting(Reason.ENGINE_STARTING), "the wait to be told")
    reasons: dict[ReplicaState, str] = {
        "starting": "the engine is starting for 3 s",
        "quarantined": "SGLang exited with 1",
    }
    for state, reason in reasons.items():
        client.set(keys.replica("generation-0"), heartbeat(state, reason))
        until(partial(is_last, looked_at, reason), "a look at it")
        assert not learner.has_begun()
    client.set(keys.replica("generation-0"), heartbeat("starting", ""))
    until(learner.has_begun, "the learner to begin")
    assert not learner.waits.is_waiting(Reason.ENGINE_STARTING)
    again = Learner(client, keys)
    until(again.has_begun, "a learner that is started again beside the engine to begin at once")


def test_a_learner_waits_for_its_engine_neither_for_ever_nor_when_asked_to_stop(
    client: redis.Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = Learner(client, keys)
    stopping.stop.set()
    until(stopping.has_begun, "the end of a wait that was stopped")
    late = Learner(client, keys, deadline_s=0.01)
    until(late.has_begun, "the end of a wait at its deadline")
    assert "no engine within 0 s: the learner takes its share of the GPU without one" in caplog.text
