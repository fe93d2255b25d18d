"""The learner's own program with simulated steps.

    python -m benchmarks.scale.simulated_learner STRETCH MILLIONS [arguments of headrace.learner]

A step takes the recorded time times `STRETCH` instead of computing, and changes 1.5 % of a bfloat16 model of `MILLIONS`
of weights by one unit in the last place. A step's row has two further numbers: `group_staleness`, the staleness of each
group, and `sent_bytes`, the bytes that the learner's HTTP service had sent by then. Replicas on this machine fetch
weights over HTTP, like those on other machines.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import headrace.learner.__main__ as program
from benchmarks.scale.recorded_run import read_recorded
from benchmarks.weights.encodings import random_pair
from headrace.common.config import RunConfig
from headrace.common.wire import Group
from headrace.learner import assembly
from headrace.learner.algorithm.staleness import group_staleness
from headrace.learner.model.policy import Policy
from headrace.learner.reporting import http_api
from headrace.learner.training.step_metrics import group_metrics
from headrace.learner.training.trainer import Probe, Trainer, no_probe
from headrace.learner.weights import publisher

CHANGED_SHARE = 0.015
_sent = Counter[str]()


class Weights(Policy):
    """Publishes `weights` instead of the model's."""

    weights: torch.Tensor

    def published_weights(self) -> Mapping[str, Any]:
        return {"weights": self.weights}


class Steps(Trainer):
    def __init__(self, config: RunConfig, policy: Weights, step_s: float, num_weights: int) -> None:
        super().__init__(config, policy)
        self.step_s = step_s
        self.weights = policy
        both = random_pair(num_weights, CHANGED_SHARE)
        self._pair = [torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) for bits in both]
        policy.weights = self._pair[0]

    def train(
        self, groups: Sequence[Group], step: int, version_steps: Mapping[int, int], probe: Probe = no_probe
    ) -> dict[str, Any]:
        time.sleep(self.step_s)
        self._pair.reverse()
        self.weights.weights = self._pair[0]
        levels = [group_staleness(group, step, version_steps).total for group in groups]
        return {"group_staleness": levels, "sent_bytes": _sent["bytes"], **group_metrics(groups)}


class Counting:
    """Counts the bytes of an ASGI application's responses."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def count(message: Any) -> None:
            _sent["bytes"] += len(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, count)


def counted_app(*arguments: Any) -> Any:
    app = http_api.make_app(*arguments)
    app.add_middleware(Counting)
    return app


def main() -> int:
    stretch, millions = (float(sys.argv.pop(1)) for _ in range(2))

    def build_trainer(config: RunConfig, _: object) -> Steps:
        step_s = read_recorded().step_s * stretch
        return Steps(config, Weights(config.model, config.learner), step_s, int(millions * 1e6))

    with (
        patch.object(assembly, "build_trainer", build_trainer),
        patch.object(program, "make_app", counted_app),
        patch.object(publisher, "machine_id", lambda: ""),
    ):
        return program.main()


if __name__ == "__main__":
    sys.exit(main())
