"""Starts the real SGLang server on an ordinary CPU.

    python -m headrace.generation.engine.cpu.launch_server <sglang.launch_server args>

SGLang's Python code runs on CPU torch, but two of its imports exist only as compiled CUDA or AMX builds. This module
replaces those, registers hooks that make SGLang faster on a CPU without changing its results (`attention`, `prefill`,
`sampling`), lets SGLang fork its scheduler and detokenizer instead of spawning them, and then runs
`sglang.launch_server` unchanged.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import runpy
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from headrace.common.process.child_process import set_parent_death_signal

if TYPE_CHECKING:
    import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    stride: int,
) -> None:
    """Writes each request's new KV slots into its row: `req_to_token[row, start:end] = next end - start slots`.

    It is the only kernel of `sgl_kernel` that is called when SGLang serves a dense model on a CPU
    (`mem_cache/allocation.py`). `stride` is the length of a row; it is not needed here.
    """
    taken = 0
    rows = zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True)
    for row, first, last in rows:
        req_to_token[row, first:last] = out_cache_loc[taken : taken + last - first]
        taken += last - first


def _absent_kernel(name: str) -> Any:
    """A function that raises when called. SGLang imports dozens of kernels for features that are not used here."""
    if name.startswith("__"):
        raise AttributeError(name)  # the import machinery probes for `__path__` and the like

    def absent(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not available: this SGLang runs without compiled kernels")

    return absent


def install_sgl_kernel() -> None:
    """Installs a stand-in module `sgl_kernel`: with its CPU engine on, SGLang imports names from it unconditionally."""
    stand_in = ModuleType("sgl_kernel", "Headrace's stand-in for SGLang's compiled kernels on a CPU.")
    stand_in.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu  # type: ignore[attr-defined]
    stand_in.__getattr__ = _absent_kernel  # type: ignore[method-assign]
    sys.modules.setdefault("sgl_kernel", stand_in)


def declare_torchvision_ops() -> None:
    """Declares two operators that PyPI's torchvision, a CUDA build, cannot load beside CPU torch.

    Without them SGLang's `import torchvision` fails with "operator torchvision::nms does not exist".
    """
    import torch.library

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def register_cpu_hooks() -> None:
    """Registers the hooks around SGLang's functions; SGLang's processes apply them when they load plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from headrace.generation.engine.cpu import attention as cpu_attention
    from headrace.generation.engine.cpu import prefill as cpu_prefill
    from headrace.generation.engine.cpu import sampling as cpu_sampling

    for target, hook in (cpu_attention.HOOKS | cpu_prefill.HOOKS | cpu_sampling.HOOKS).items():
        HookRegistry.register(target, hook, HookType.AROUND)


class ImportErrorBuffer(logging.Filter):
    """Holds back SGLang's log lines about models that it cannot import here: a dozen need compiled kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        is_import_error = record.getMessage().startswith("Ignore import error")
        if is_import_error:
            self.lines.append(record.getMessage())
        return not is_import_error

    def print_lines(self, *_args: object, **_kwargs: object) -> None:
        """Called when the requested model is not among the imported ones."""
        print(*self.lines, sep="\n", file=sys.stderr, flush=True)


def buffer_import_errors() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    import_errors = ImportErrorBuffer()
    logging.getLogger("sglang.srt.models.registry").addFilter(import_errors)
    unsupported = "sglang.srt.models.registry._ModelRegistry._raise_for_unsupported"
    HookRegistry.register(unsupported, import_errors.print_lines, HookType.BEFORE)


def fork_children() -> None:
    """Makes SGLang fork the scheduler and the detokenizer from the server, which has done all their imports.

    SGLang spawns them, as CUDA requires, and each spends 12 s of one core on the same imports. Forking is safe: at that
    time the server has one thread and has computed nothing, so no lock is held and no thread pool is lost.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def choose_fork(*_: object) -> None:
        multiprocessing.set_start_method("fork", force=True)

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", choose_fork, HookType.AFTER)
    os.register_at_fork(after_in_child=set_parent_death_signal())  # SGLang does so too, but a moment later


if __name__ == "__main__":
    install_sgl_kernel()
    declare_torchvision_ops()
    register_cpu_hooks()
    buffer_import_errors()
    fork_children()
    runpy.run_module("sglang.launch_server", run_name="__main__")
