"""Runs a plain `rollout` in a thread of its own, whose requests are sent by the event loop.

A thread cannot be ended from outside. When its episode is cancelled, the request that it waits for raises, and every
later one. A rollout that neither asks for a reply nor returns then goes on until its worker is killed.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from headrace.common.environments.chat import Send


class _Requests:
    """Sends requests until it is closed; then those under way and all later ones are cancelled."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._under_way: set[asyncio.Task[Any]] = set()
        self._is_open = True

    async def __call__(self, body: dict[str, Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        if not self._is_open:
            raise asyncio.CancelledError
        self._under_way.add(task)
        try:
            return await self._send(body)
        finally:
            self._under_way.discard(task)

    def close(self) -> None:
        self._is_open = False
        for task in self._under_way:
            task.cancel()


async def run_in_thread(play: Callable[[Send], Any], send: Send, name: str) -> Any:
    """What `play` returns in a new thread. It gets a `send` for requests from that thread by way of this event loop.

    Returns, or raises, only when the thread has ended, also if the call is cancelled.
    """
    loop = asyncio.get_running_loop()
    requests, ended = _Requests(send), loop.create_future()

    def run() -> None:
        result: tuple[Any, BaseException | None]
        try:
            result = play(requests), None
        except BaseException as error:  # noqa: BLE001 - a rollout is foreign code and may raise anything
            result = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker ends
            loop.call_soon_threadsafe(ended.set_result, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        returned, error = await asyncio.shield(ended)
    except asyncio.CancelledError:
        requests.close()
        await ended
        raise
    if error is not None:
        raise error
    return returned
