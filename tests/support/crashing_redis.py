"""What can happen to a process between any two of its Redis commands, for tests of the protocol.

A `Trap` stands between the product's code and the client it was given, counts the commands and springs once, at the
command that it was armed for. Pipelines pass it: the product's only read.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import redis
import redis.asyncio
from hypothesis import strategies as st

Kind = Literal["before", "after", "twice", "frozen", "full"]


class Crash(BaseException):
    """The process dies here. No `Exception`: nothing in the product may catch it."""


class Fault(NamedTuple):
    """`before`, `after`: dies before the command is sent, or when the server has executed it and nobody has seen the
    answer. `twice`: the answer is lost and the client sends it again. `frozen`: has the answer, and sleeps while others
    go on. `full`: the server refuses what needs memory from this command on."""

    kind: Kind
    at: int
    """The commands that pass before it."""


def faults(num_commands: int, *kinds: Kind) -> st.SearchStrategy[Fault | None]:
    """None, or one of `kinds` at one of the next `num_commands` commands."""
    return st.none() | st.builds(Fault, st.sampled_from(kinds), st.integers(0, num_commands - 1))


class Trap:
    """`while_frozen` is what others do meanwhile; `fill` and `empty` change the server."""

    def __init__(self, while_frozen: Callable[[], None], fill: Callable[[], None], empty: Callable[[], None]) -> None:
        self._while_frozen = while_frozen
        self._fill, self._empty = fill, empty
        self._fault: Fault | None = None
        self.sprung: Kind | None = None
        """Of the last arming."""

    @contextmanager
    def armed(self, fault: Fault | None) -> Iterator[None]:
        self._fault, self.sprung = fault, None
        try:
            yield
        finally:
            self._fault = None
            if self.sprung == "full":
                self._empty()

    def guard(self, client: redis.Redis) -> redis.Redis:
        execute: Callable[..., Any] = client.execute_command

        def execute_command(*arguments: Any, **options: Any) -> Any:
            kind = self._before()
            reply = execute(*arguments, **options)
            if kind == "twice":
                reply = execute(*arguments, **options)
            self._after(kind)
            return reply

        client.execute_command = execute_command
        return client

    def guard_async(self, client: redis.asyncio.Redis) -> redis.asyncio.Redis:
        execute: Callable[..., Awaitable[Any]] = client.execute_command

        async def execute_command(*arguments: Any, **options: Any) -> Any:
            kind = self._before()
            reply = await execute(*arguments, **options)
            if kind == "twice":
                reply = await execute(*arguments, **options)
            self._after(kind)
            return reply

        client.execute_command = execute_command
        return client

    def _before(self) -> Kind | None:
        fault = self._fault
        if fault is None:
            return None
        if fault.at:
            self._fault = fault._replace(at=fault.at - 1)
            return None
        self._fault = None
        self.sprung = fault.kind if fault.kind != "frozen" else None
        if fault.kind == "before":
            raise Crash
        if fault.kind == "full":
            self._fill()
        return fault.kind

    def _after(self, kind: Kind | None) -> None:
        if kind == "after":
            raise Crash
        if kind == "frozen":
            self._while_frozen()
            self.sprung = kind
