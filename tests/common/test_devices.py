"""Which GPUs there are, whether `auto` uses them, and which service gets which."""

import importlib.util
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.common.hardware import device
from headrace.common.hardware.device import resolve_device, why_not_cuda
from headrace.common.hardware.gpus import Gpu, visible_gpus
from headrace.common.hardware.placement import MIB, assign_gpus, engine_static_bytes
from headrace.common.wire.desired_state import MAX_REPLICAS
from tests.support.fake_gpus import GIB, FakeGpus

EIGHT = [str(index) for index in range(8)]


@pytest.mark.parametrize(
    ("visible", "ranks", "replicas", "tp_size", "learner", "engines"),
    [
        (EIGHT, 1, 4, 1, "0", "1 2 3 4 5 6 7"),
        (EIGHT, 4, 1, 2, "0,1,2,3", "4,5 6,7"),
        (EIGHT, 2, 2, 3, "0,1", "2,3,4 5,6,7"),
        (EIGHT, 3, 1, 4, "0,1,2", "3,4,5,6"),
        (EIGHT, 0, 8, 1, "", "0 1 2 3 4 5 6 7"),
        (EIGHT, 8, 0, 1, "0,1,2,3,4,5,6,7", ""),
        (["5", "2"], 1, 1, 1, "5", "2"),
        (["GPU-a", "MIG-b", "GPU-c"], 1, 2, 1, "GPU-a", "MIG-b GPU-c"),
        (["0"], 1, 0, 1, "0", ""),
    ],
)
def test_the_learners_ranks_come_first_then_each_replica(
    visible: list[str], ranks: int, replicas: int, tp_size: int, learner: str, engines: str
) -> None:
    placement = assign_gpus(visible, ranks=ranks, replicas=replicas, tp_size=tp_size, is_split=False)
    assert ",".join(placement.learner) == learner
    assert [",".join(names) for names in placement.engines] == engines.split()
    assert not placement.is_shared


@pytest.mark.parametrize("ranks", range(9))
@pytest.mark.parametrize("tp_size", range(1, 9))
def test_no_gpu_is_given_twice_and_none_is_left_that_another_replica_could_use(ranks: int, tp_size: int) -> None:
    placement = assign_gpus(EIGHT, ranks=ranks, replicas=0, tp_size=tp_size, is_split=True)
    given = [*placement.learner, *itertools.chain(*placement.engines)]
    assert given == EIGHT[: len(given)], "each once, in their order"
    assert len(EIGHT) - len(given) < tp_size and {len(names) for names in placement.engines} <= {tp_size}


def test_engines_that_need_no_gpu_are_not_bounded_by_them() -> None:
    placement = assign_gpus(["0"], ranks=1, replicas=9, tp_size=0, is_split=False)
    assert placement.learner == ("0",) and placement.engines == ((),) * MAX_REPLICAS
    assert assign_gpus([], ranks=0, replicas=MAX_REPLICAS, tp_size=0, is_split=False).learner == ()


def test_one_gpu_is_shared_only_by_an_explicit_split() -> None:
    shared = assign_gpus(["3"], ranks=1, replicas=1, tp_size=1, is_split=True)
    assert shared == (("3",), (("3",),), True)
    assert not assign_gpus(["0", "1"], ranks=1, replicas=1, tp_size=1, is_split=True).is_shared, "there are two"
    with pytest.raises(ValueError, match=r"1 GPU is visible \(3\), and .* need 2; expected .*learner.memory_fraction"):
        assign_gpus(["3"], ranks=1, replicas=1, tp_size=1, is_split=False)
    with pytest.raises(ValueError, match=r"need 3; expected generation\.replicas 1 at most"):
        assign_gpus(["3"], ranks=1, replicas=2, tp_size=1, is_split=True)


@pytest.mark.parametrize(
    ("visible", "ranks", "replicas", "tp_size", "line"),
    [
        (["0", "1"], 1, 4, 1, r"2 GPUs are visible \(0, 1\), and learner.num_ranks 1 and 4 replicas of "
         r"generation.engine.tp_size 1 need 5; expected generation.replicas 1 at most \(headrace up --replicas 1\)"),
        (EIGHT, 2, 4, 2, "need 10; expected generation.replicas 3 at most"),
        (EIGHT, 9, 0, 1, r"and learner.num_ranks 9 need 9; expected fewer learner.num_ranks"),
        (["0", "1"], 1, 1, 2, "need 3; expected fewer learner.num_ranks, a smaller generation.engine.tp_size"),
        ([], 1, 1, 1, "0 GPUs are visible, and .* need 2; expected device: cpu or auto, or GPUs that"),
        ([], 0, 1, 1, "0 GPUs are visible, and 1 replica of generation.engine.tp_size 1 need 1"),
    ],
)  # fmt: skip
def test_too_few_gpus_are_refused_with_the_numbers_and_the_next_step(
    visible: list[str], ranks: int, replicas: int, tp_size: int, line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        assign_gpus(visible, ranks=ranks, replicas=replicas, tp_size=tp_size, is_split=False)


def test_the_split_of_a_gpu_adds_up() -> None:
    """With what SGLang takes beside weights and cache, by its own reckoning, and the learner's libraries."""
    total = 24 * GIB
    beside = 512 * MIB + 2048 * 1.5 * MIB + 256 * 2 * MIB + GIB
    assert engine_static_bytes(total, 0.5, 256) == 12 * GIB - beside
    assert engine_static_bytes(total, 0.9, 256) < 0, "nothing is left"


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    fake = FakeGpus(tmp_path, 8)
    monkeypatch.setattr(device, "DEVICE_FILES", fake.files)
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    return fake


def test_all_gpus_are_visible_in_the_drivers_order(eight: FakeGpus) -> None:
    eight.tell((81920, 1000), (24576, 24576))
    assert visible_gpus() == [Gpu("0", 80 * GIB, 1000 * MIB), Gpu("1", 24 * GIB, 24 * GIB)]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("3,1", ["3", "1"]),
        (" 2 , 5", ["2", "5"]),
        ("GPU-4444,GPU-22", ["GPU-4444", "GPU-22"]),
        ("MIG-1,MIG-2", ["MIG-1", "MIG-2"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,-1,2", ["1"]),
        ("0,8,1", ["0"]),
        ("GPU-9", []),
        ("cpu", []),
    ],
)
def test_cuda_visible_devices_is_the_list_that_is_handed_out(
    eight: FakeGpus, monkeypatch: pytest.MonkeyPatch, given: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [gpu.name for gpu in visible_gpus()] == names


def test_a_gpu_that_is_named_has_its_own_memory(eight: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    eight.tell((10240, 1024), (20480, 2048), (30720, 3072))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-11")
    assert visible_gpus() == [Gpu("2", 30 * GIB, 3 * GIB), Gpu("GPU-11", 20 * GIB, 2 * GIB)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,1")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is '1,1': it names 1 twice"):
        visible_gpus()


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho 'No devices were found'\n", None])
def test_without_the_drivers_word_gpus_are_counted_by_their_files(eight: FakeGpus, script: str | None) -> None:
    if script is None:
        eight.query.unlink()
    else:
        eight.query.write_text(script)
    assert visible_gpus() == [Gpu(str(index)) for index in range(8)]


def test_a_gpu_in_the_machines_own_memory_has_no_figure(eight: FakeGpus) -> None:
    eight.query.write_text("#!/bin/sh\necho 'GPU-1, [N/A], [N/A]'\n")
    assert visible_gpus() == [Gpu("0")]


def test_nobody_is_asked_where_there_is_no_gpu(
    eight: FakeGpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "DEVICE_FILES", tmp_path)
    assert visible_gpus() == []
    assert not eight.query.with_name("asked").exists()


def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *names: str, cuda: str | None = "13.0") -> None:
    """As if these modules were, and torch a build for that CUDA."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\n")
    found = {name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")) for name in names}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)


@pytest.mark.parametrize(
    ("names", "cuda", "missing"),
    [
        (["torch", "sglang", "sgl_kernel"], "13.0", ""),
        (["torch"], "13.0", ""),  # a machine for a learner
        (["torch", "sglang"], "13.0", "not installed here: SGLang's compiled kernels (sgl_kernel)"),
        (["torch", "sglang", "sgl_kernel"], None, "not installed here: a CUDA build of torch"),
        (["torch", "sglang"], None, "a CUDA build of torch and SGLang's compiled kernels (sgl_kernel)"),
        ([], None, "not installed here: a CUDA build of torch"),
    ],
)
def test_auto_is_cuda_only_where_all_that_it_needs_is_there(
    eight: FakeGpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: list[str], cuda: str | None, missing: str
) -> None:
    installed(monkeypatch, tmp_path, *names, cuda=cuda)
    assert missing in why_not_cuda() and bool(missing) == bool(why_not_cuda())
    assert resolve_device("auto") == ("cpu" if missing else "cuda")
    assert resolve_device("cpu") == "cpu" and resolve_device("cuda") == "cuda"


@pytest.mark.parametrize("hiding", ["", "-1", " "])
def test_auto_is_the_cpu_where_all_gpus_are_hidden(
    eight: FakeGpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hiding: str
) -> None:
    installed(monkeypatch, tmp_path, "torch", "sglang", "sgl_kernel")
    assert resolve_device("auto") == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hiding)
    assert resolve_device("auto") == "cpu" and why_not_cuda() == "no NVIDIA GPU is visible to this process"


def test_wsl2_has_no_device_files_of_its_own(eight: FakeGpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, tmp_path, "torch", "sglang", "sgl_kernel")
    files, libraries = tmp_path / "wsl", tmp_path / "lib"
    for folder in (files, libraries):
        folder.mkdir()
    (files / "dxg").touch()
    monkeypatch.setattr(device, "DEVICE_FILES", files)
    monkeypatch.setattr(device, "WSL_LIBRARIES", libraries)
    assert resolve_device("auto") == "cpu", "another maker's GPU has dxg too"
    (libraries / "libcuda.so.1").touch()
    assert resolve_device("auto") == "cuda"
    eight.query.unlink()
    assert visible_gpus() == [Gpu("0")]


def test_this_machines_torch_is_told_without_importing_it() -> None:
    import torch

    assert (device.missing_for_cuda(is_engine=False) == "") == (torch.version.cuda is not None)


def test_the_tests_see_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and visible_gpus() == []
