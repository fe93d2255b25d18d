"""Torch's random state as tensors of a checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor

from headrace.learner.distributed.state_files import RANDOM_STATE_PREFIX

_CPU, _CUDA = f"{RANDOM_STATE_PREFIX}cpu", f"{RANDOM_STATE_PREFIX}cuda."


def random_state() -> dict[str, Tensor]:
    """The states of the CPU and of every GPU, by name."""
    states = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"{_CUDA}{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Restores what `random_state` returned; a GPU or a rank that `tensors` lacks keeps its state."""
    if _CPU in tensors:
        torch.set_rng_state(tensors[_CPU])
    for index in range(torch.cuda.device_count()):
        if f"{_CUDA}{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"{_CUDA}{index}"], index)
