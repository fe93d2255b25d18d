"""The packages that a run on this machine needs, the check that they are installed, and the commands to install them.

The extras are those of pyproject.toml. SGLang's metadata requires CUDA builds, so on a machine without a GPU SGLang and
torchvision are installed separately, without their dependencies.
"""

import importlib.util
import sys
from pathlib import Path

REQUIRED_PACKAGES = ("aiohttp", "datasets", "matplotlib", "safetensors", "torch", "transformers")
"""The packages that the learner and the replicas import, from the extras `learner` and `generation`."""
SGLANG, TORCHVISION = "sglang==0.5.23", "torchvision==0.28.0"
CPU_TORCH = "--extra-index-url https://download.pytorch.org/whl/cpu"
CPU_PACKAGES = Path(sys.prefix) / "sglang-cpu"
"""The folder of torchvision, which only SGLang uses: it is a CUDA build, and with it and CPU torch no other process can
import transformers."""
CPU_COMMAND = (
    f"pip install {CPU_TORCH} 'headrace[learner,generation,launcher,engine-cpu]' && pip install --no-deps {SGLANG} && "
    f"pip install --no-deps --target {CPU_PACKAGES} {TORCHVISION}"
)
GPU_COMMAND = f"pip install 'headrace[learner,generation,launcher]' {SGLANG}"
INSTALL_COMMANDS = f"without a GPU: {CPU_COMMAND}; with one: {GPU_COMMAND}; in a checkout without a GPU: make setup"


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_installed() -> None:
    """Raises `ValueError` with the missing packages and the commands that install them."""
    if missing := [package for package in REQUIRED_PACKAGES if not is_installed(package)]:
        raise ValueError(f"not installed here: {', '.join(missing)}; expected, {INSTALL_COMMANDS}")
