"""What Compose and the images are made of, as far as it can be told without an engine."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
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
        ("deploy/constraints-gpu.txt", ["learner", "generation"]),
    ],
)
def test_every_package_has_an_exact_version(file: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    assert {plain(re.split("[=<>]", name)[0]) for name in wanted} <= pinned(file)


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


def test_each_replica_takes_a_gpu_that_no_other_has(tmp_path: Path) -> None:
    variables = {"HEADRACE_GPUS": "1,3", "HEADRACE_GPU_LOCKS": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [str(ONE_GPU), "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; read line"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def gpu_of(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    first, second = start(), start()
    assert {gpu_of(first), gpu_of(second)} == {"1", "3"}
    refused = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "HEADRACE_GPUS=1,3" in refused.stderr
    first.kill()
    first.communicate()
    third = start()
    assert gpu_of(third)
    for process in (second, third):
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    free = {name: value for name, value in variables.items() if name != "HEADRACE_GPUS"}
    done = subprocess.run([str(ONE_GPU), "sh", "-c", "echo ${CUDA_VISIBLE_DEVICES-all}"], env=free, capture_output=True)
    assert done.stdout == b"all\n"
