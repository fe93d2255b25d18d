"""A TCP proxy on loopback that can fail like a network: refuse, reset, delay, stall.

It runs an event loop in a thread. It delivers stalled data when the stall ends, in the order of each connection, even
after the sender has closed, as a network may. After the `with` block its thread and connections are gone.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Self

HOST = "127.0.0.1"
CHUNK_BYTES = 1 << 16
CALL_TIMEOUT_S = 10.0
RESET = struct.pack("ii", 1, 0)
"""The value of SO_LINGER with which a close is a reset (`man 7 socket`)."""


class Proxy:
    """Forwards clients at `port` to the server at `target_port`; its methods may be called from any thread."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self._delay_s = 0.0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._passes = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._pass())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()

    def cut(self) -> None:
        """Resets every connection and refuses new ones."""
        self._call(self._refuse())

    def delay(self, delay_s: float) -> None:
        """Delays every chunk in each direction."""
        self._delay_s = delay_s

    def stall(self) -> None:
        """Accepts connections but forwards nothing."""
        self._loop.call_soon_threadsafe(self._passes.clear)

    def pass_on(self) -> None:
        """Ends every failure: forwards everything again."""
        self._call(self._pass())

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)

    async def _pass(self) -> None:
        self._delay_s = 0.0
        self._passes.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, HOST, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()

    async def _close(self) -> None:
        await self._refuse()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self._open.add(writer)
        try:
            await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # the peer at the other end sees its connection end
        finally:
            writer.transport.abort()
            self._open.discard(writer)
            self._serving.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(HOST, self.target_port)
        self._open.add(server_writer)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pump(reader, server_writer))
                directions.create_task(self._pump(server_reader, writer))
        except* OSError:
            pass
        finally:
            server_writer.transport.abort()
            self._open.discard(server_writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forwards until the sender closes; the close is forwarded, too."""
        while True:
            chunk = await reader.read(CHUNK_BYTES)
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._passes.wait()
            if not chunk:
                break
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()
