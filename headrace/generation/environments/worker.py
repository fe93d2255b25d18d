"""The program of an environment worker: plays many episodes at a time, and reports how each has ended.

An `async def rollout` runs on this process's event loop, a plain one in a thread of its own. A task that is an
asynchronous context manager is entered before the first episode, and left when the parent closes the connection.
"""

import asyncio
import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import msgspec

from headrace.common.environments.chat import BlockingChat, Chat, Send
from headrace.common.environments.client import ChatClient
from headrace.generation.environments.messages import (
    Begin,
    Cancelling,
    Ended,
    EpisodeStart,
    FromWorker,
    ToWorker,
)
from headrace.generation.environments.threads import run_in_thread
from headrace.generation.workers.outcomes import outcome_of
from headrace.generation.workers.program import (
    LENGTH_BYTES,
    LoadedTask,
    SetupReply,
    describe_error,
    load_for_parent,
    with_length,
)


def run_worker() -> None:
    """Runs the worker until its parent closes the connection."""
    loaded = load_for_parent()
    if loaded is not None:
        asyncio.run(_serve(loaded))


async def _serve(loaded: LoadedTask) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=loaded.connection)
    async with contextlib.AsyncExitStack() as stack:
        try:
            task: Any = loaded.task
            if hasattr(task, "__aenter__"):
                task = await stack.enter_async_context(task)
        except BaseException as error:  # noqa: BLE001 - a task is foreign code and may raise anything
            writer.write(with_length(SetupReply(describe_error(error))))
            await writer.drain()
            return
        client = await stack.enter_async_context(ChatClient())
        writer.write(with_length(SetupReply(has_rollout=True)))
        episodes = PlayedEpisodes(task, client, lambda message: writer.write(with_length(message)))
        stack.push_async_callback(episodes.cancel_all)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length = int.from_bytes(await reader.readexactly(LENGTH_BYTES))
                episodes.handle(msgspec.msgpack.decode(await reader.readexactly(length), type=ToWorker))


class PlayedEpisodes:
    """The episodes of this worker. `send` sends a message to its parent."""

    def __init__(self, task: Any, client: ChatClient, send: Callable[[FromWorker], None]) -> None:
        self._task = task
        self._client = client
        self._send = send
        self._playing: dict[int, asyncio.Task[None]] = {}

    def handle(self, message: ToWorker) -> None:
        if isinstance(message, Begin):
            self._playing[message.id] = asyncio.create_task(self._play(message), name=message.episode.name)
            return
        self._send(Cancelling(message.id))
        if playing := self._playing.get(message.id):
            playing.cancel()

    async def cancel_all(self) -> None:
        for playing in self._playing.values():
            playing.cancel()
        await asyncio.gather(*self._playing.values(), return_exceptions=True)

    async def _play(self, begin: Begin) -> None:
        try:
            ended = Ended(begin.id, outcome_of(await self._rollout(begin.episode)))
        except BaseException as error:  # noqa: BLE001 - as above
            ended = Ended(begin.id, problem=describe_error(error))
        del self._playing[begin.id]
        self._send(ended)

    async def _rollout(self, episode: EpisodeStart) -> Any:
        ticket = episode.ticket
        settings: dict[str, Any] = {
            "base_url": episode.base_url,
            "api_key": episode.api_key,
            "model": episode.model,
            "seed": episode.seed,
            "attempt": episode.attempt,
        }

        def send(body: dict[str, Any]) -> Any:
            return self._client.sample(episode.base_url, episode.api_key, body)

        if inspect.iscoroutinefunction(self._task.rollout):
            return await self._task.rollout(Chat(send, ticket.messages, ticket.tools, **settings), ticket)

        def play(send: Send) -> Any:
            chat = BlockingChat(loop, send, ticket.messages, ticket.tools, **settings)
            return self._task.rollout(chat, ticket)

        loop = asyncio.get_running_loop()
        return await run_in_thread(play, send, episode.name)


if __name__ == "__main__":
    run_worker()
