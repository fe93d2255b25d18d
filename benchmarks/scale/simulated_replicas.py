"""Replicas with simulated engines and rewards, several in one process; everything else is the product's own code.

    HEADRACE_REDIS_URL=... HEADRACE_TOKEN=... python -m benchmarks.scale.simulated_replicas STRETCH NAME...

For a group a simulated engine takes the time of a recorded one (recorded_run.py), and answers with as many random
tokens. A swap takes the recorded time too, and the tokens of completions in progress change their version at that time.
The engine is not faster with fewer groups in flight. Rewards are the recorded ones. `STRETCH` multiplies lengths and
durations. SIGTERM ends all replicas at once; they hand their tickets back.
"""

import asyncio
import contextlib
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.scale.recorded_run import RecordedGroup, RecordedRun, read_recorded
from headrace.common.bootstrap import JoinedRun, join_run
from headrace.common.http.addresses import listen, socket_url
from headrace.common.http.service import serve_in_loop
from headrace.common.metrics.families import SHORT_S, Histogram
from headrace.common.process.waiting import Waits
from headrace.common.tasks import Outcome
from headrace.common.wire import Ticket, VersionSpan
from headrace.generation import assembly
from headrace.generation.engine.completions import Completion
from headrace.generation.engine.swaps.swapping import SwapTimings
from headrace.generation.http_api import make_app

NUM_REMEMBERED = 64
"""Number of versions whose start times an engine remembers."""
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(2, 500, 1 << 16).tolist()
LOGPROBS = -RANDOM.random(1 << 16, np.float32)


class Engine:
    """Replaces `headrace.generation.engine.client.Engine`; has what the supervisor and the weight updater use."""

    recorded: RecordedRun
    stretch: float
    is_loading = False
    has_unverified_weights = False

    def __init__(self, url: str, **_: object) -> None:
        self.url = url
        self._random = random.Random()
        self._served: list[tuple[float, int]] = []
        """For each version, since when it is served."""

    @property
    def last_heard_at(self) -> float:
        return time.monotonic()

    async def generate(self, ticket: Ticket) -> list[Completion]:
        group, began_s = self._random.choice(self.recorded.groups), time.monotonic()
        await asyncio.sleep(group.seconds * self.stretch)
        took_s = time.monotonic() - began_s
        return [self._completion(group, place, began_s, took_s) for place in range(ticket.num_completions)]

    def _completion(self, group: RecordedGroup, place: int, began_s: float, took_s: float) -> Completion:
        num_tokens = max(1, round(group.num_tokens[place] * self.stretch))
        first = self._random.randrange(len(TOKENS) - num_tokens)
        token_s = took_s / max(1.0, max(group.num_tokens) * self.stretch)
        return Completion(
            tokens=TOKENS[first : first + num_tokens],
            behaviour_logprobs=LOGPROBS[first : first + num_tokens],
            version_spans=spans(self._served, began_s, token_s, num_tokens),
            finish_reason="stop",
            text=f"{group.rewards[place]} " + "x" * (3 * num_tokens),
        )

    async def swap(self, folder: Path, version: int) -> SwapTimings:
        pause_s = self.recorded.swap_pause_s
        await asyncio.sleep(pause_s)
        self._served = [*self._served[1 - NUM_REMEMBERED :], (time.monotonic(), version)]
        return SwapTimings(pause_s=pause_s, load_s=pause_s, confirm_s=0.0, total_s=pause_s)

    async def wait_for_progress(self, swapped: SwapTimings) -> None:
        await asyncio.sleep(swapped.pause_s)

    async def weight_version(self) -> int | None:
        return self._served[-1][1] if self._served else None

    async def health(self, timeout_s: float = 0.0) -> bool:
        return True

    async def aclose(self) -> None:
        pass


def spans(served: list[tuple[float, int]], began_s: float, token_s: float, num_tokens: int) -> list[VersionSpan]:
    """Spans of tokens sampled every `token_s` from `began_s` on, by an engine that has `served` these versions."""
    starts = {max(0, math.ceil((since_s - began_s) / token_s)): version for since_s, version in served}
    found = sorted((start, version) for start, version in starts.items() if start < num_tokens)
    ends = [*(start for start, _ in found[1:]), num_tokens]
    return [VersionSpan(version, start, end) for (start, version), end in zip(found, ends, strict=True)]


class Rewards:
    """Replaces the reward pool; the reward is the number at the beginning of the text."""

    def __init__(self, *_: object, **__: object) -> None:
        self.seconds = Histogram(SHORT_S)
        self.problem = ""

    async def start(self) -> bool:
        return True

    async def score(self, ticket: Ticket, completions: list[str]) -> list[Outcome]:
        return [Outcome(float(text.partition(" ")[0])) for text in completions]

    async def close(self) -> None:
        pass


async def serve(joined: JoinedRun, redis_url: str, name: str) -> None:
    """Runs one replica until it is cancelled."""
    sock = listen("127.0.0.1", 0)
    where = (name, socket_url(sock), Path(), Waits())
    async with (
        assembly.assemble_replica(joined.config, joined.keys, redis_url, joined.token, *where) as replica,
        serve_in_loop(make_app(replica, joined.token), sock),
    ):
        await replica.serve()


async def serve_all(names: list[str]) -> None:
    redis_url, task = os.environ["HEADRACE_REDIS_URL"], asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with patch.multiple(assembly, Engine=Engine, RewardPool=Rewards), contextlib.suppress(asyncio.CancelledError):
        joined = await asyncio.to_thread(join_run, redis_url, None, None, Waits())
        async with asyncio.TaskGroup() as replicas:
            for name in names:
                replicas.create_task(serve(joined, redis_url, name), name=name)


if __name__ == "__main__":
    Engine.recorded, Engine.stretch = read_recorded(), float(sys.argv[1])
    asyncio.run(serve_all(sys.argv[2:]))
