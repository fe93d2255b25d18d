"""The devices of a run on this machine: which GPUs its services see, and the lines that describe the plan.

`assign_devices` is called before anything starts and refuses what the machine's GPUs cannot serve. The names in the
launcher's CUDA_VISIBLE_DEVICES are passed on unchanged. A service that runs on the CPU sees no GPU.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from headrace.common.config import RunConfig
from headrace.common.hardware.device import (
    VISIBLE_DEVICES,
    is_gpu_visible,
    missing_for_cuda,
    resolve_device,
    why_not_cuda,
)
from headrace.common.hardware.gpus import Gpu, visible_gpus
from headrace.common.hardware.placement import Placement, assign_gpus
from headrace.common.preflight.recipe import UnavailableHere
from headrace.launcher.placement.shared_gpu import check_split, propose_split

ORDER = "CUDA_DEVICE_ORDER"
GIB = 1 << 30


class Devices(NamedTuple):
    placement: Placement
    gpus: dict[str, Gpu]
    """The visible GPUs, by name; empty if no service of the run needs one."""
    notes: list[str]
    """Reasons why GPUs of this machine are not used."""

    @property
    def max_replicas(self) -> int:
        return len(self.placement.engines)

    @property
    def arguments(self) -> list[str]:
        """Arguments for learner and replicas."""
        return ["--shares-gpu"] if self.placement.is_shared else []

    def learner_environment(self) -> dict[str, str]:
        """Variables to add to the service's environment."""
        return self._environment(self.placement.learner)

    def replica_environment(self, index: int) -> dict[str, str]:
        return self._environment(self.placement.engines[index])

    def _environment(self, names: tuple[str, ...]) -> dict[str, str]:
        shown = {VISIBLE_DEVICES: ",".join(names)}
        if names and VISIBLE_DEVICES not in os.environ:  # indices are in nvidia-smi's order
            shown[ORDER] = os.environ.get(ORDER, "PCI_BUS_ID")
        return shown


def assign_devices(config: RunConfig) -> Devices:
    """Raises `UnavailableHere` if this machine lacks what the services need, `ValueError` for an impossible split."""
    learner, engine = config.learner, config.generation.engine
    ranks = learner.num_ranks if resolve_device(learner.device) == "cuda" else 0
    tp_size = engine.tp_size if engine.url is None and resolve_device(engine.device) == "cuda" else 0
    for name, device, is_engine in (("learner", learner.device, False), ("generation.engine", engine.device, True)):
        is_wanted = device == "cuda" and (tp_size if is_engine else ranks)
        if is_wanted and (missing := missing_for_cuda(is_engine)):
            raise UnavailableHere(
                f"{name}.device is 'cuda', and {missing}; expected the installation for GPUs (docs/running.md)"
            )
    gpus = visible_gpus() if ranks or tp_size else []
    is_split = learner.memory_fraction is not None
    try:
        names = [gpu.name for gpu in gpus]
        placement = assign_gpus(
            names, ranks=ranks, replicas=config.generation.replicas, tp_size=tp_size, is_split=is_split
        )
    except ValueError as error:
        raise UnavailableHere(f"{error}{_proposal(config, gpus)}") from error
    if placement.is_shared:
        check_split(config, gpus[0])
    return Devices(placement, {gpu.name: gpu for gpu in gpus}, list(_notes(config)))


def _proposal(config: RunConfig, gpus: list[Gpu]) -> str:
    learner, engine = config.learner, config.generation.engine
    if len(gpus) == learner.num_ranks == engine.tp_size == 1 and config.generation.replicas == 1:
        return f": {propose_split(config, gpus[0])}"
    return ""


def _notes(config: RunConfig) -> Iterator[str]:
    """Notes on GPUs that no service uses."""
    devices = (config.learner.device, config.generation.engine.device)
    if not is_gpu_visible() or "cuda" in map(resolve_device, devices):
        return
    if "auto" in devices:
        yield f"the GPU is not used: {why_not_cuda()} (docs/running.md, Install)"
    else:
        use = " ".join(f"--set {name}.device=auto" for name in ("learner", "generation.engine"))
        yield f"the GPU is not used: the recipe's device is cpu, and {use} would use it"


def plan_lines(config: RunConfig, missing: list[str]) -> list[str]:
    """Lines with the GPUs of each service, and notes; appends to `missing` what this machine lacks."""
    try:
        devices = assign_devices(config)
    except UnavailableHere as problem:
        missing.append(str(problem))
        return []
    return [*device_lines(config, devices), *devices.notes]


def device_lines(config: RunConfig, devices: Devices) -> Iterator[str]:
    """Lines with the GPUs of each service."""
    placement, replicas = devices.placement, config.generation.replicas
    if placement.is_shared:
        name, share = placement.learner[0], config.learner.memory_fraction or 0.0
        yield f"{_shown(devices, (name,))}: the learner has {share:.0%} of its memory, generation-0 the rest"
        return
    yield f"{_shown(devices, placement.learner)}: the learner"
    if config.generation.engine.url is not None:
        yield "the engine is somebody else's (generation.engine.url)"
        return
    if not any(placement.engines):
        yield "the CPU: the engines"
        return
    for index, names in enumerate(placement.engines):
        yield f"{_shown(devices, names)}: {f'generation-{index}' if index < replicas else 'free for one more replica'}"


def _shown(devices: Devices, names: tuple[str, ...]) -> str:
    if not names:
        return "the CPU"
    total = devices.gpus[names[0]].total_bytes
    memory = f" ({total / GIB:.0f} GiB{' each' * (len(names) > 1)})" if total else ""
    return f"GPU{'s' * (len(names) > 1)} {', '.join(names)}{memory}"
