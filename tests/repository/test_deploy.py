"""What Compose and the images are made of, as far as it can be told without an engine."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from headrace.common.config import load_recipe
from headrace.launcher.estimates.host_memory import shared_memory_bytes
from headrace.launcher.estimates.model_size import read_shape
from tests.launcher.test_estimates import QWEN_1_5B
from tests.support.guard import GUARD_S

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
ONE_GPU = ROOT / "deploy" / "one-gpu"


def pinned(file: str) -> set[str]:
    lines = (ROOT / file).read_text().splitlines()
    names = [re.fullmatch(r"([\w.-]+)==[\w.]+", line) for line in lines]
    assert all(names), f"{file}: expected nothing but name==version"
    return {plain(found[1]) for found in names if found}


def plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("constraints.txt", ["learner", "generation", "launcher", "engine-cpu", "dev"]),
        ("deploy/constraints-gpu.txt", ["learner", "generation", "launcher"]),
    ],
)
def test_every_package_has_an_exact_version(file: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    assert {plain(re.split("[=<>]", name)[0]) for name in wanted} <= pinned(file)


def test_the_images_compiler_is_of_the_release_of_cudas_headers() -> None:
    """CCCL and FlashInfer refuse any other (`CUDA compiler and CUDA toolkit headers are incompatible`)."""
    versions = dict(line.split("==") for line in (ROOT / "deploy" / "constraints-gpu.txt").read_text().splitlines())
    headers = release(versions["nvidia-cuda-runtime"])
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-nvrtc", "cuda-toolkit"):
        assert release(versions[name]) == headers, f"{name} {versions[name]} for the headers of CUDA {headers}"


def release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def test_the_gpu_image_is_not_built_if_no_kernel_can_be_made() -> None:
    stage = re.search(r"^FROM ground AS gpu$(.*?)^FROM ", DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL)
    assert stage is not None
    lines = stage[1].splitlines()
    installed, linked, compiled = (
        next(number for number, line in enumerate(lines) if text in line)
        for text in ("sglang==", "ln -s lib $CUDA_HOME/lib64", "RUN SGLANG_JIT_CACHE_DIR=")
    )
    assert installed < linked < compiled
    assert "ln -s libcudart.so.13 $CUDA_HOME/lib/libcudart.so" in lines[linked]
    assert " python /dependencies/compile_kernels.py " in lines[compiled]


def test_what_the_images_copy_reaches_their_build() -> None:
    allowed = (ROOT / ".dockerignore").read_text().split()
    copied = [line.split()[1:-1] for line in DOCKERFILE.read_text().splitlines() if line.startswith("COPY ")]
    for source in (one for sources in copied for one in sources):
        assert (ROOT / source).exists(), source
        assert any(f"!{path}" in allowed for path in (source, *map(str, Path(source).parents))), source


@pytest.mark.slow
def test_kernels_are_compiled_for_hopper_and_a_failure_is_one(tmp_path: Path) -> None:
    """With a compiler that only notes what it is asked for: SGLang has the kernels, and whoever builds is told."""
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(f"#!/bin/sh\necho $* >> {tmp_path / 'asked'}; cat cuda.cu >> {tmp_path / 'asked'}; exit 1\n")
    compiler.chmod(0o755)
    variables = os.environ | {"CUDA_HOME": str(tmp_path / "cuda"), "SGLANG_JIT_CACHE_DIR": str(tmp_path / "kernels")}
    command = [sys.executable, str(ROOT / "deploy" / "compile_kernels.py")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode != 0 and "Failed to build JIT module" in done.stderr, done.stderr
    asked = (tmp_path / "asked").read_text()
    assert "code=sm_90a" in asked and "activation.cuh" in asked, asked


def test_every_service_is_confined() -> None:
    """Those of the monitoring, which no engine has run here, too."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert len(services) == 6
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] and service["mem_limit"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), f"{name} beyond loopback"
        assert re.search(":[^:]+$", service["image"]), f"{name} of any version"


def test_compose_on_gpus_takes_any_number_of_them_and_shared_memory_for_the_model() -> None:
    """Every variable of .env has the default that Compose has."""
    text = (ROOT / "deploy" / "compose.gpu.yml").read_text()
    given = dict(
        line.split("=") for line in (ROOT / "deploy" / ".env.example").read_text().splitlines() if line[:1].isalpha()
    )
    both = text + (ROOT / "docker-compose.yml").read_text()
    for name, value in given.items():
        if name not in ("COMPOSE_FILE", "HEADRACE_RUN"):
            assert f"${{{name}:-{value}}}" in both, name
    services = yaml.safe_load(text)["services"]
    for name in ("learner", "generation"):
        (devices,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices["count"] == "all" and "device_ids" not in devices
    assert "--set learner.num_ranks=${HEADRACE_LEARNER_RANKS:-1}" in services["learner"]["command"]
    assert "--set generation.engine.tp_size=${HEADRACE_TP_SIZE:-1}" in services["learner"]["command"]
    shape, config = read_shape(QWEN_1_5B), load_recipe(ROOT / "configs" / "gsm8k-qwen2.5-1.5b.yaml").config
    assert services["generation"]["shm_size"].startswith("${HEADRACE_SHM:-16g}")
    assert shared_memory_bytes(shape, config) < 16 << 30


def test_each_replica_takes_a_gpu_that_no_other_has(tmp_path: Path) -> None:
    variables = {"HEADRACE_GPUS": "1,3", "HEADRACE_GPU_LOCKS": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [str(ONE_GPU), "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; read line"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def gpu_of(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    first, other = start(), start()
    assert {gpu_of(first), gpu_of(other)} == {"1", "3"}
    refused = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=GUARD_S)
    assert refused.returncode == 2 and "HEADRACE_GPUS=1,3" in refused.stderr
    first.kill()
    first.communicate()
    third = start()
    assert gpu_of(third)
    for process in (other, third):
        process.communicate("\n", timeout=GUARD_S)
        assert process.returncode == 0
    pairs = variables | {"HEADRACE_GPUS": "0,1,2,3,4", "HEADRACE_TP_SIZE": "2"}
    with subprocess.Popen(command, env=pairs, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as fourth:
        assert gpu_of(fourth) == "0,1"
        second = subprocess.run(command, env=pairs, input="\n", capture_output=True, text=True, timeout=GUARD_S)
        assert second.stdout.strip() == "2,3", "and the last one, alone, is nobody's"
        fourth.communicate("\n", timeout=GUARD_S)
    free = {name: value for name, value in variables.items() if name != "HEADRACE_GPUS"}
    done = subprocess.run([str(ONE_GPU), "sh", "-c", "echo ${CUDA_VISIBLE_DEVICES-all}"], env=free, capture_output=True)
    assert done.stdout == b"all\n"
