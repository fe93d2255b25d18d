"""A control service in a thread of the test, for any run in Redis."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import httpx

from headrace.common.config import load_recipe
from headrace.common.http.addresses import bearer_header, listen, socket_url
from headrace.common.redis.keys import Keys
from headrace.control.assembly import running_app, serving
from headrace.control.view.run_monitor import RunMonitor
from tests.support.fake_services import until
from tests.support.guard import GUARD_S
from tests.support.seeded_run import RECIPE

TOKEN = "the-run's-token"


class Control:
    """A client: `ask` sends the token, `http` does not."""

    def __init__(self, url: str, monitor: RunMonitor, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self.monitor = monitor
        self.loop = loop
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=GUARD_S)

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, **arguments: Any) -> httpx.Response:
        return self.http.request(method, path, headers=(headers or {}) | bearer_header(TOKEN), **arguments)

    def refresh(self) -> None:
        """Polls Redis twice, because a replica is known one poll after its key was found."""
        for _ in range(2):
            asyncio.run_coroutine_threadsafe(self.monitor.refresh(), self.loop).result(GUARD_S)

    def status(self) -> dict[str, Any]:
        self.refresh()
        found: dict[str, Any] = self.http.get("/status").json()
        return found

    def wait_for(self, is_so: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Waits until the status fulfils `is_so`."""
        seen: list[dict[str, Any]] = [{}]

        def poll() -> bool:
            seen[0] = self.status()
            return is_so(seen[0])

        until(poll, what, lambda: seen[0].get("verdict"))
        return seen[0]

    @contextlib.contextmanager
    def events(self) -> Iterator[Iterator[tuple[str, Any]]]:
        """The name and the decoded data of every server-sent event."""
        with self.http.stream("GET", "/events") as response:
            assert response.status_code == 200, response.read()
            yield _events(response.iter_lines())


def _events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


@contextlib.contextmanager
def a_control(redis_url: str, keys: Keys, require_token_for_reads: bool = False) -> Iterator[Control]:
    config, sock = load_recipe(RECIPE, []).config, listen("127.0.0.1", 0)
    started: Future[Control] = Future()
    ended: list[Callable[[], object]] = []

    async def serve() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        ended.append(lambda: loop.call_soon_threadsafe(over.set))
        parts = running_app(keys.run, config, redis_url, TOKEN, require_token_for_reads)
        async with parts as (app, monitor), serving(app, monitor, sock):
            started.set_result(Control(socket_url(sock), monitor, loop))
            await over.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=run, name="control")
    thread.start()
    try:
        control = started.result(GUARD_S)
        control.refresh()
        yield control
        control.http.close()
    finally:
        for end in ended:
            end()
        thread.join(GUARD_S)
        sock.close()
        assert not thread.is_alive()
