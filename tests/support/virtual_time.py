"""An event loop whose clock jumps to the next timer instead of waiting for it. It is for code without input or output.

Its deadlines depend on no machine's speed.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        super().__init__()
        self._now_s = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def skip(timeout_s: float | None) -> Any:
            assert timeout_s is not None, "every task waits, and no timer runs"
            self._now_s += timeout_s
            return select(0)

        selector.select = skip

    def time(self) -> float:
        return self._now_s


def run_in_virtual_time(scenario: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(scenario)
