"""ASGI middleware that counts and times requests by route."""

import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.common.metrics.families import SHORT_S, Families, Histogram

STREAM = "/events"
"""Lasts as long as the page is open, so it is not timed."""


class RequestTotals:
    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._seconds: dict[str, Histogram] = {}

    def add(self, method: str, route: str, status: int, seconds: float) -> None:
        self._counts[method, route, str(status)] += 1
        if route != STREAM:
            self._seconds.setdefault(route, Histogram(SHORT_S)).observe(seconds)

    def collect(self, families: Families) -> None:
        text = "Requests that were answered, by route and status."
        for (method, route, status), count in self._counts.items():
            labels = {"method": method, "route": route, "status": status}
            families.counter("headrace_control_requests_total", text, count, **labels)
        for route, histogram in self._seconds.items():
            families.histogram("headrace_control_request_seconds", "Time of a request.", histogram, route=route)


class RequestCounter:
    """Wraps an app and adds each of its requests to `totals`."""

    def __init__(self, app: ASGIApp, totals: RequestTotals) -> None:
        self._app = app
        self._totals = totals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observe)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope.get("route") else "none"
            self._totals.add(method, route, status, time.monotonic() - started)
