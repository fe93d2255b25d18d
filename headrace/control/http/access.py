"""Helpers of all routes: the caller's name, documented error responses, and the present view."""

from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from headrace.common.wire import one_line
from headrace.control.view.run_monitor import RunMonitor, RunView

MAX_AGENT_CHARS = 60

_TEXTS = {
    400: "The request cannot be parsed.",
    401: "The run's token is missing or wrong.",
    404: "Not found.",
    408: "The request took too long to arrive.",
    409: "The request conflicts with the present state; `detail` says how.",
    413: "The request is too large.",
    422: "The request is not valid; `detail` says what is wrong.",
    503: "Redis or a replica does not answer, or too many pages are connected. Try again later.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route for the OpenAPI document."""
    schema = {"$ref": "#/components/schemas/Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {status: {"description": _TEXTS[status], "content": content} for status in statuses}


def caller_of(request: Request) -> str:
    """The caller for an event: address and user agent."""
    address = request.client.host if request.client else "?"
    agent = request.headers.get("user-agent", "")[:MAX_AGENT_CHARS]
    return one_line(f"{address} ({agent})" if agent else address)


def service_unavailable(why: str, after_s: int = 1) -> HTTPException:
    return HTTPException(503, why, headers={"Retry-After": str(after_s)})


def require_view(monitor: RunMonitor) -> RunView:
    """The present view; responds with 503 if Redis has not answered since control's start."""
    if monitor.view is None:
        raise service_unavailable("Redis has not answered yet")
    return monitor.view
