"""`GET /metrics`: what a service collects at each scrape, and its process, in the format that the scraper asks for."""

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
    """`collect` runs in the server's event loop: it reads memory and waits for nobody. `route_options` is FastAPI's."""
    registry = CollectorRegistry()
    registry.register(_AtScrape(collect))
    ProcessCollector(registry=registry)

    @app.get("/metrics", operation_id="metrics", response_class=Response, **route_options)
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})
