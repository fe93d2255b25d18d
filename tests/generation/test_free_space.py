"""A folder that is too small for the weights gives an error with advice instead of a SIGBUS."""

import asyncio
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.common.config import RunConfig
from headrace.common.process.waiting import Waits
from headrace.common.redis.keys import Keys
from headrace.common.weights.files import WeightsError
from headrace.generation import __main__ as program
from headrace.generation.assembly import assemble_replica
from headrace.generation.weights import local_weights
from headrace.generation.weights.free_space import InsufficientSpace, allocate, check_capacity
from tests.support.fleet import Member, Versions, a_source
from tests.support.guard import GUARD_S

SMALL_BYTES = 4 << 20


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tmpfs of 4 MiB; if none can be mounted, an ordinary folder that behaves like one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return

    def free_bytes() -> int:
        return SMALL_BYTES - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def allocate(descriptor: int, _: int, num_bytes: int) -> None:
        if num_bytes > free_bytes():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(descriptor, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes()))
    yield folder


def test_an_allocation_that_does_not_fit_raises_and_leaves_no_file(small: Path) -> None:
    file = allocate(small / "fits", 3 << 20)
    file[:] = 7
    with pytest.raises(
        InsufficientSpace, match=r"small/more: 0\.00195 GiB cannot be allocated \(No space left.*HEADRACE_SHM"
    ):
        allocate(small / "more", 2 << 20)
    assert [path.name for path in small.iterdir()] == ["fits"] and bool((file == 7).all())


@pytest.mark.parametrize("num_items", [1_500_000, 2_500_000])
def test_a_version_that_does_not_fit_leaves_the_served_one_as_it_is(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_items: int
) -> None:
    """3 MB: the second version does not fit beside the first. 5 MB: the first does not fit."""
    monkeypatch.setattr(local_weights, "memory_backed_folder", lambda: small)
    versions = Versions(tmp_path / "weights", num_items)
    model = tmp_path / "model"
    model.mkdir()

    async def scenario() -> None:
        with a_source(versions.root) as learner:
            member = Member(model)
            versions.publish()
            if num_items < 2_000_000:
                await member.take(versions.published(learner.url))
                versions.publish()
            with pytest.raises(WeightsError, match=r"GiB (cannot be allocated|are needed).*make it larger"):
                await member.take(versions.published(learner.url))
            served = [path.name for path in member.local.root.glob("v*")]
            assert served == (["v00000001"] if num_items < 2_000_000 else [])
            await member.close()

    asyncio.run(asyncio.wait_for(scenario(), GUARD_S))


def test_two_versions_must_fit(demo_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000))
    check_capacity(tmp_path, demo_policy, "bfloat16")  # 0.66 M parameters: 2.6 MB
    with pytest.raises(
        InsufficientSpace, match=r"0\.00373 GiB free, 2 versions of .*policy in float32 need 0\.00\d+ GiB: "
    ):
        check_capacity(tmp_path, demo_policy, "float32")
    check_capacity(tmp_path, tmp_path, "float32")  # nothing to measure


def test_a_replica_without_space_is_refused_before_anything_starts(
    demo_policy: Path, redis_url: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    monkeypatch.setattr(local_weights, "memory_backed_folder", lambda: tmp_path)
    config = RunConfig.model_validate({"model": {"path": str(demo_policy)}, "task": {"name": "arithmetic"}})

    async def serve(*_: Any) -> None:
        async with assemble_replica(config, keys, redis_url, "token", "a", "http://127.0.0.1:1", tmp_path, Waits()):
            raise AssertionError("it must not serve")

    joined = SimpleNamespace(config=config, keys=keys, token="token")
    monkeypatch.setattr(program, "_parse_arguments", lambda: SimpleNamespace(
        name="a", redis_url=redis_url, run=None, token_file=None, host=None, port=None
    ))  # fmt: skip
    monkeypatch.setattr(program, "join", lambda *_: joined)
    monkeypatch.setattr(program, "listen_with_overrides", lambda *_: None)
    monkeypatch.setattr(program, "set_up_logging", lambda *_, **__: None)
    monkeypatch.setattr(program, "_serve", serve)
    assert program.main() == 2
    assert "2 versions of" in capsys.readouterr().err
    assert list(tmp_path.glob("headrace-weights-*")) == []
