"""`GET /metrics`: a service's metrics, collected at each scrape, and its process's, in the scraper's format."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

Collect = Callable[[], Iterable[Metric]]


class _AtScrape(Collector):
    def __init__(self, collect: Collect) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        yield from self._collect()


def mount_metrics(app: FastAPI, collect: Collect, **route_options: Any) -> None:
    """`collect` runs in the server's event loop, so it must not block. `route_options` are FastAPI's."""
    registry = CollectorRegistry()
    registry.register(_AtScrape(collect))
    ProcessCollector(registry=registry)

    @app.get("/metrics", operation_id="metrics", response_class=Response, **route_options)
    async def metrics(request: Request) -> Response:
        """The metrics in Prometheus' format."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})
