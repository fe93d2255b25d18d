"""Requests of an episode and their replies, so that a request that is sent again gets the reply of the first."""

import asyncio
import hashlib
from collections.abc import Mapping

from headrace.generation.gateway.errors import EPISODE_OVER, GatewayError
from headrace.generation.gateway.replies import ChatReply

RETRY_COUNT = "x-stainless-retry-count"
"""Above 0 where a client of OpenAI's sends a request again."""
IDEMPOTENCY_KEY = "idempotency-key"


class Exchange:
    """A request that is being answered, or was; its reply does not depend on the connection."""

    def __init__(self, key: bytes, reply: asyncio.Task[ChatReply]) -> None:
        self.key = key
        self.reply = reply
        self.is_delivered = False
        """Whether a client was there to read the reply."""
        self.num_retries = 0

    def result(self) -> ChatReply:
        """The reply, once it is there. Raises `GatewayError`, also if the episode ended before."""
        if self.reply.cancelled():
            raise GatewayError(409, EPISODE_OVER)
        return self.reply.result()


class Exchanges:
    """Of one episode."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, list[Exchange]] = {}

    def under_way(self) -> list[Exchange]:
        return [one for same in self._by_key.values() for one in same if not one.reply.done()]

    def find(self, key: bytes) -> Exchange | None:
        """The exchange that a retry repeats. If several had the same body, it is one whose reply nobody has read and no
        other retry waits for, the latest first."""
        same = self._by_key.get(key, [])
        found = min(reversed(same), key=lambda one: (one.is_delivered, one.num_retries), default=None)
        if found is not None:
            found.num_retries += 1
        return found

    def add(self, key: bytes, reply: asyncio.Task[ChatReply]) -> Exchange:
        """A reply that fails, or is none of the model's, is forgotten: the request sent again is a new one."""
        exchange = Exchange(key, reply)
        self._by_key.setdefault(key, []).append(exchange)
        reply.add_done_callback(lambda _: self._forget_failed(exchange))
        return exchange

    def _forget_failed(self, exchange: Exchange) -> None:
        reply = exchange.reply
        if not reply.cancelled() and reply.exception() is None and reply.result().limit is None:
            return
        self._by_key[exchange.key].remove(exchange)
        if not self._by_key[exchange.key]:
            del self._by_key[exchange.key]


def key_of(content: bytes, headers: Mapping[str, str]) -> tuple[bytes, bool]:
    """What a request and its retries have in common, and whether the request may be a retry: without a marker the same
    body is a new sample."""
    digest = hashlib.sha256(content)
    given = headers.get(IDEMPOTENCY_KEY, "")
    digest.update(b"\0" + given.encode())
    return digest.digest(), bool(given) or headers.get(RETRY_COUNT, "0") not in ("", "0")
