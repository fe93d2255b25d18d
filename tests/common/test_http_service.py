"""How a service says where it is reached."""

import asyncio
import contextlib
import socket

import pytest

from headrace.common.http.addresses import listen, socket_url


def test_a_service_on_all_addresses_is_reached_where_it_is_told_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere, here = listen("0.0.0.0", 0), listen("127.0.0.1", 0)
    with everywhere, here:
        monkeypatch.setenv("HEADRACE_ADVERTISED_HOST", "10.1.2.3")
        assert socket_url(everywhere) == f"http://10.1.2.3:{everywhere.getsockname()[1]}"
        assert socket_url(here) == f"http://127.0.0.1:{here.getsockname()[1]}"
        monkeypatch.delenv("HEADRACE_ADVERTISED_HOST")
        assert not socket_url(everywhere).startswith("http://10.1.2.3")


def test_small_writes_of_a_service_are_sent_at_once() -> None:
    async def no_delay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served = writer.get_extra_info("socket")
            found.set_result(served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with contextlib.closing(listen("127.0.0.1", 0)) as sock:
            async with await asyncio.start_server(accepted, sock=sock):
                _, writer = await asyncio.open_connection(*sock.getsockname())
                option = await found
                writer.close()
                return option

    assert asyncio.run(no_delay()) != 0
