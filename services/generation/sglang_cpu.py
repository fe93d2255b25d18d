"""The real SGLang server on an ordinary CPU: `python -m services.generation.sglang_cpu <sglang.launch_server args>`.

SGLang's Python code runs on CPU torch, but two things it imports exist only as compiled CUDA or AMX builds.
This module puts stand-ins for them in place, hooks in a batched attention (`cpu_attention`), and then runs
`sglang.launch_server` unchanged. SGLang spawns its scheduler and detokenizer, and a spawned process imports the main
module again before anything else: all of it is therefore installed in both, the server is launched only where this
module is the program.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import runpy
import signal
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PARENT_VARIABLE = "HEADRACE_SGLANG_PARENT"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    stride: int,
) -> None:
    """Writes each request's new KV slots into its row: `req_to_token[row, start:end] = next end - start slots`.

    The only kernel of `sgl_kernel` that serving a dense model on a CPU calls (`mem_cache/allocation.py`).
    `stride` is the length of a row, which the tensor knows itself.
    """
    taken = 0
    rows = zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True)
    for row, first, last in rows:
        req_to_token[row, first:last] = out_cache_loc[taken : taken + last - first]
        taken += last - first


def _absent_kernel(name: str) -> Any:
    """What any other name of `sgl_kernel` stands for: SGLang imports dozens, for features that nobody uses here."""
    if name.startswith("__"):
        raise AttributeError(name)  # the import machinery probes for `__path__` and the like

    def absent(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not available: this SGLang runs without compiled kernels")

    return absent


def install_sgl_kernel() -> None:
    """A module `sgl_kernel`: with its CPU engine on, SGLang imports names from it unconditionally."""
    stand_in = ModuleType("sgl_kernel", "Headrace's stand-in for SGLang's compiled kernels on a CPU.")
    stand_in.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu  # type: ignore[attr-defined]
    stand_in.__getattr__ = _absent_kernel  # type: ignore[method-assign]
    sys.modules.setdefault("sgl_kernel", stand_in)


def declare_torchvision_ops() -> None:
    """Declares two operators that PyPI's torchvision, a CUDA build, cannot load beside CPU torch.

    Without them `import torchvision`, which SGLang does, dies with "operator torchvision::nms does not exist".
    """
    import torch.library

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def die_with_parent() -> None:
    """A spawned process is killed with the one that spawned it, from here on.

    SGLang asks the kernel for this too, but only after 10 s of imports. `multiprocessing.parent_process` is not set
    yet, so each process leaves its id to those it spawns.
    """
    parent_pid = os.environ.get(PARENT_VARIABLE)
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if __name__ == "__mp_main__":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if str(os.getppid()) != parent_pid:  # it died before we asked
            os._exit(1)


if __name__ in ("__main__", "__mp_main__"):
    die_with_parent()  # before torch is imported, which takes seconds
    install_sgl_kernel()
    declare_torchvision_ops()
    importlib.import_module("services.generation.cpu_attention").install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
