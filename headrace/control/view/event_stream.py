"""Server-sent events for many pages: each message is encoded once and sent to all of them as the same bytes.

The buffer of each page is bounded. A page that falls behind is dropped; it reconnects and reads what it has missed.
"""

import asyncio
from collections import deque

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MAX_SUBSCRIBERS = 512
MAX_WAITING_BYTES = 256 << 10
"""Buffer of one page, in addition to the buffer of its connection."""
COMMENT_INTERVAL_S = 15.0
RETRY = b"retry: 2000\n\n"


class TooManySubscribers(RuntimeError):
    """The maximum number of pages is connected."""


def message(name: str, payload: bytes) -> bytes:
    """`payload` is JSON on one line."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), payload)


class Subscriber:
    """The buffer of one page."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._num_bytes = 0
        self._has_content = asyncio.Event()
        self.is_closed = False

    def put(self, part: bytes) -> bool:
        """False if the buffer would overflow: then the subscriber is closed and its buffer dropped."""
        self._num_bytes += len(part)
        if self._num_bytes > MAX_WAITING_BYTES:
            self.close()
            return False
        self._waiting.append(part)
        self._has_content.set()
        return True

    def close(self) -> None:
        self._waiting.clear()
        self._num_bytes = 0
        self.is_closed = True
        self._has_content.set()

    async def next(self) -> bytes:
        """Waits for content and returns all of it; empty when closed."""
        await self._has_content.wait()
        self._has_content.clear()
        found = b"".join(self._waiting)
        self._waiting.clear()
        self._num_bytes = 0
        return found


class Hub:
    """All connected pages."""

    def __init__(self, max_subscribers: int = MAX_SUBSCRIBERS) -> None:
        self._max_subscribers = max_subscribers
        self._subscribers: set[Subscriber] = set()
        self.num_dropped = 0
        """Pages dropped so far because they fell behind."""
        self.num_published_bytes = 0
        """Bytes published so far, each counted once, however many pages there are."""

    @property
    def num_subscribers(self) -> int:
        return len(self._subscribers)

    def subscribe(self, *first: bytes) -> Subscriber:
        """A subscriber that gets `first` and then everything published. Raises `TooManySubscribers`."""
        if len(self._subscribers) >= self._max_subscribers:
            raise TooManySubscribers(f"{self._max_subscribers} pages are connected already; close one")
        subscriber = Subscriber()
        subscriber.put(b"".join([RETRY, *first]))
        self._subscribers.add(subscriber)
        return subscriber

    def leave(self, subscriber: Subscriber) -> None:
        subscriber.close()
        self._subscribers.discard(subscriber)

    def publish(self, part: bytes) -> None:
        """Sends one or more messages to every page."""
        self.num_published_bytes += len(part)
        for subscriber in list(self._subscribers):
            if not subscriber.put(part):
                self._subscribers.discard(subscriber)
                self.num_dropped += 1

    async def keep_alive(self) -> None:
        """Sends a comment at intervals, so that pages notice a broken connection."""
        while True:
            await asyncio.sleep(COMMENT_INTERVAL_S)
            self.publish(b":\n\n")

    def close(self) -> None:
        """Ends the stream of every page."""
        for subscriber in list(self._subscribers):
            self.leave(subscriber)


class EventStream(Response):
    """The response that sends a subscriber's messages until control or the page closes it."""

    media_type = "text/event-stream"
    charset = "utf-8"

    def __init__(self, hub: Hub, subscriber: Subscriber) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._hub = hub
        self._subscriber = subscriber

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(self._leave_when_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while not self._subscriber.is_closed:
                if part := await self._subscriber.next():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            self._hub.leave(self._subscriber)

    async def _leave_when_disconnected(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._hub.leave(self._subscriber)
