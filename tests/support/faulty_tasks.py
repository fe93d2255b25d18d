"""Tasks for the tests of the reward pool, chosen by import path; their rewards run in its workers."""

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from headrace.common.tasks import Outcome, Prompt, Split
from headrace.common.wire import Ticket

ODD = {
    "nan": math.nan,
    "inf": math.inf,
    "text": "1.0",
    "none": None,
    "array": np.ones(2),
    "complex": 1j,
    "true": True,
    "np.true": np.bool_(True),
    "np.float": np.float32(0.5),
    "np.int": np.int64(3),
    "0d": np.array(2.0),
    "np.nan": np.float64(math.nan),
}
"""What a reward may return; some of it is a number."""
OUTCOMES: dict[str, Any] = {
    "": Outcome(np.float32(1.0), {"length": np.int64(3), "exact": True}),  # type: ignore[arg-type, dict-item]
    "inf": Outcome(1.0, {"length": math.inf}),
    "name": Outcome(1.0, {"two words": 1.0}),
    "many": Outcome(1.0, {str(number): 1.0 for number in range(65)}),
    "list": Outcome(1.0, [1.0]),  # type: ignore[arg-type]
    "nan": Outcome(math.nan),
}


class Obedient:
    """Does what the completion says; a number is its own reward."""

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor
        self._asked: Counter[str] = Counter()

    def prompts(self, split: Split, *, seed: int, epoch: int) -> Iterator[Prompt]:
        return iter(())

    def reward(self, completion: str, ticket: Ticket) -> Any:
        order, _, argument = completion.partition(" ")
        match order:
            case "spy":
                return spy(Path(argument))
            case "pid":
                return os.getpid()
            case "print":
                return chatter()
            case "raise":
                raise ValueError("\ud800 is no text")
            case "hang":
                hang()
            case "hang_with_child":
                hang_with_child(argument)
            case "eat":
                eat_memory()
            case "exit":
                os._exit(7)
            case "leave":
                sys.exit("enough")
            case "oom_killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "return":
                return ODD[argument]
            case "outcome":
                return OUTCOMES[argument]
            case "fail":  # so many times, then return how often it was asked
                self._asked[argument] += 1
                if self._asked[argument] <= int(argument.partition(" ")[0]):
                    raise ValueError(f"not yet {argument}")
                return self._asked[argument]
        return self._factor * float(completion)


class Awaited(Obedient):
    """The same by a coroutine, and what only one can do."""

    def __init__(self) -> None:
        super().__init__()
        self._met: set[str] = set()
        self._all_met = asyncio.Event()

    async def reward(self, completion: str, ticket: Ticket) -> Any:
        match completion.split():
            case ["meet", number, "of", num_all]:
                self._met.add(number)
                if len(self._met) == int(num_all):
                    self._all_met.set()
                await self._all_met.wait()
                return float(number)
            case ["wait"]:
                await asyncio.Event().wait()
            case ["timeout"]:
                raise TimeoutError("the judge is busy")
            case ["cancel"]:
                raise asyncio.CancelledError
        await asyncio.sleep(0)
        return super().reward(completion, ticket)


class Unloadable(Obedient):
    def __init__(self) -> None:
        raise RuntimeError("the judge's rules are lost")


class Greedy(Obedient):
    def __init__(self) -> None:
        eat_memory()


def hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("hanging", file=sys.stderr, flush=True)
    threading.Event().wait()


def hang_with_child(fifo: str) -> None:
    """The child holds `fifo` open for as long as it lives."""
    with Path(fifo).open("wb") as held:
        subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"], stdout=held)
    hang()


def eat_memory() -> None:
    """More than the tests' limit, but no more than a machine without limits can spare."""
    eaten = bytearray(1 << 30)
    del eaten


def spy(path: Path) -> float:
    """Writes down what the worker was handed: its environment, its arguments, and what its descriptors are."""
    found = [f"{name}={value}" for name, value in os.environ.items()]
    found += [*Path("/proc/self/environ").read_text().split("\0"), *Path("/proc/self/cmdline").read_text().split("\0")]
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(f"descriptor {descriptor.readlink()}")
    path.write_text("\n".join(found))
    return 1.0


def chatter() -> float:
    """Writes where a naive worker would answer, and reads where it would listen."""
    print("a reward thinks aloud " * 10_000, flush=True)
    os.write(1, b"\x00\x00\x00\x01!")
    return float(len(sys.stdin.read()))


class Raises(Obedient):
    def reward(self, completion: str, ticket: Ticket) -> Any:
        raise RuntimeError("no reward today")
