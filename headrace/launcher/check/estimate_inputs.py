"""The inputs of the estimates of `headrace check`: recipe, prompts, the model's shape, devices."""

import statistics
from dataclasses import dataclass
from functools import cached_property

from headrace.common.config import RunConfig
from headrace.common.hardware.device import resolve_device
from headrace.common.hardware.gpus import visible_gpus
from headrace.launcher.check.prompt_trial import TaskTrial
from headrace.launcher.estimates.device_memory import TYPICAL_PROMPT_TOKENS
from headrace.launcher.estimates.model_size import Shape


@dataclass
class EstimateInputs:
    config: RunConfig
    found: TaskTrial
    """The results of the prompts that were tried."""
    shape: Shape | None
    """The model's shape, if it is known."""
    notes: list[str]

    @property
    def device_of_learner(self) -> str:
        return resolve_device(self.config.learner.device)

    @property
    def device_of_engine(self) -> str:
        return resolve_device(self.config.generation.engine.device)

    @property
    def is_local_engine(self) -> bool:
        return self.config.generation.engine.url is None

    @cached_property
    def gpu_bytes(self) -> int:
        """Memory of the smallest GPU; 0 if the run uses none, or its memory is unknown."""
        if "cuda" not in (self.device_of_learner, self.device_of_engine):
            return 0
        return min((gpu.total_bytes for gpu in visible_gpus()), default=0)

    @property
    def prompt_tokens(self) -> int:
        """Length in tokens of the median prompt."""
        lengths = self.found.splits["train"].lengths if "train" in self.found.splits else []
        return int(statistics.median(lengths)) if lengths else TYPICAL_PROMPT_TOKENS
