"""The gateway: opens episodes, each with a secret of its own, and serves the endpoint at which they ask for replies."""

import contextlib
import hashlib
import secrets
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from headrace.common.config.environment import EnvironmentConfig
from headrace.common.http.addresses import listen, socket_url
from headrace.common.http.service import serve_in_loop
from headrace.common.models.bridge import Bridge
from headrace.common.wire import Ticket
from headrace.generation.gateway.answering import AnsweredEpisode
from headrace.generation.gateway.endpoint import make_app
from headrace.generation.gateway.episode import EpisodeServices, OpenEpisode
from headrace.generation.gateway.errors import EPISODE_OVER, GatewayError
from headrace.generation.gateway.rendering import Rendering
from headrace.generation.gateway.sampling import Sampler

HOST = "127.0.0.1"
ENGINE_WAIT_S = 600.0
"""For how long a request waits for an engine that is down."""
NUM_REMEMBERED = 4096
"""Episodes that are over, and are said to be."""


Opened = TypeVar("Opened", bound=AnsweredEpisode)


class EpisodeServer(Generic[Opened]):
    """On loopback, while `serve` runs. `make_episode` is given a ticket, the base URL and the episode's secret.

    `answers` counts the requests by status.
    """

    def __init__(self, make_episode: Callable[[Ticket, str, str], Opened]) -> None:
        self.answers: Counter[int] = Counter()
        self.base_url = ""
        self._make_episode = make_episode
        self._open: dict[bytes, Opened] = {}
        self._over: OrderedDict[bytes, None] = OrderedDict()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        """Serves at `base_url` until the block ends."""
        with contextlib.closing(listen(HOST, 0)) as sock:
            self.base_url = f"{socket_url(sock)}/v1"
            async with serve_in_loop(make_app(self._authenticate, self.answers), sock):
                yield

    @contextlib.asynccontextmanager
    async def open_episode(self, ticket: Ticket) -> AsyncIterator[Opened]:
        """An episode that may ask for replies within the block; its record is sealed afterwards."""
        secret = secrets.token_urlsafe(32)
        key = _digest(f"Bearer {secret}")
        episode = self._make_episode(ticket, self.base_url, secret)
        self._open[key] = episode
        try:
            yield episode
        finally:
            del self._open[key]
            self._over[key] = None
            if len(self._over) > NUM_REMEMBERED:
                self._over.popitem(last=False)
            await episode.close()

    def _authenticate(self, authorization: str) -> Opened:
        key = _digest(authorization)
        episode = self._open.get(key)
        if episode is not None:
            return episode
        if key in self._over:
            raise GatewayError(409, EPISODE_OVER)
        raise GatewayError(401, "this call needs the secret of an open episode: Authorization: Bearer …")


class Gateway(EpisodeServer[OpenEpisode]):
    """Of one replica. `bridge.chat` has no system prompt; `system_prompt` stands before every conversation without a
    system message. `model` is the name that clients see.

    `ignored` counts the parameters without effect by name.
    """

    def __init__(
        self,
        sampler: Sampler,
        bridge: Bridge,
        settings: EnvironmentConfig,
        model: str,
        *,
        system_prompt: str | None = None,
        engine_wait_s: float = ENGINE_WAIT_S,
    ) -> None:
        self.ignored: Counter[str] = Counter()
        self.rendering = Rendering(bridge, settings.history, system_prompt)
        self._executor = ThreadPoolExecutor(1, "gateway")
        services = EpisodeServices(
            sampler, self.rendering, self._executor, settings.constrained, engine_wait_s, self.ignored
        )
        super().__init__(lambda ticket, base_url, secret: OpenEpisode(ticket, base_url, secret, model, services))

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        try:
            async with super().serve():
                yield
        finally:
            self._executor.shutdown(wait=False, cancel_futures=True)


def _digest(authorization: str) -> bytes:
    """By which secrets are looked up, so that the time of a comparison says nothing about one."""
    return hashlib.sha256(authorization.encode(errors="replace")).digest()
