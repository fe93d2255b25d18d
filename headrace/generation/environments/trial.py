"""Plays an episode of each ticket without a model: the first reply is empty, and then the limit of turns is reached.

Whatever an environment does, it must be able to end then.
"""

import time
from collections import Counter
from collections.abc import Callable

from aiohttp import web

from headrace.common.config import RunConfig
from headrace.common.wire import Ticket
from headrace.generation.environments.messages import EpisodeStart
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.environments.process import EpisodeFailed, EpisodeInterrupted
from headrace.generation.environments.seeds import seed_of
from headrace.generation.workers.process import WorkerError

MODEL = "empty-replies"


async def play_empty_episodes(config: RunConfig, read_tickets: Callable[[], list[Ticket]]) -> str:
    """The first problem; empty if there is none. The worker starts before the tickets are read."""
    pool = EnvironmentPool(config.task, config.environment.model_copy(update={"workers": 1}))
    endpoint = _EmptyReplies()
    try:
        await pool.start()
        base_url = await endpoint.start()
        for ticket in read_tickets():
            start = EpisodeStart(ticket, 0, 0, seed_of(ticket.id, 0), base_url, ticket.id, MODEL)
            await pool.run(start, endpoint.idle_s)
            if not endpoint.num_requests[ticket.id]:
                return f"ticket {ticket.id}: it asked for no reply"
    except (EpisodeFailed, EpisodeInterrupted, WorkerError) as error:
        return str(error)
    finally:
        await pool.close()
        await endpoint.close()
    return ""


class _EmptyReplies:
    """An endpoint like the gateway's, for one episode at a time."""

    def __init__(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self._reply)
        self._runner = web.AppRunner(app, access_log=None)
        self.num_requests: Counter[str] = Counter()
        """By secret."""
        self._last_s = time.monotonic()

    async def start(self) -> str:
        """Returns its base URL."""
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}/v1"

    async def close(self) -> None:
        await self._runner.cleanup()

    def idle_s(self) -> float:
        return time.monotonic() - self._last_s

    async def _reply(self, request: web.Request) -> web.Response:
        self._last_s = time.monotonic()
        secret = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.num_requests[secret] += 1
        message = {"role": "assistant", "content": ""}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if self.num_requests[secret] > 1:
            choice |= {"finish_reason": "length", "limit": "max_turns"}
        return web.json_response({"object": "chat.completion", "model": MODEL, "choices": [choice]})
