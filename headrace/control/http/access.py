"""What a route needs of its caller, and what it may answer when something is wrong: one place for all routes."""

from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from headrace.common.wire import one_line
from headrace.control.view.run_monitor import RunMonitor, RunView

MAX_AGENT_CHARS = 60

_TEXTS = {
    400: "The request cannot be read.",
    401: "The run's token is missing or wrong.",
    404: "There is no such thing.",
    408: "The request took too long to come.",
    409: "Something stands against it.",
    413: "The request is too large.",
    422: "The request is not valid; `detail` says what is wrong.",
    503: "Not now: Redis, a replica, or another page has to go first.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documents error answers of a route."""
    schema = {"$ref": "#/components/schemas/Problem"}
    content = {"application/problem+json": {"schema": schema}}
    return {status: {"description": _TEXTS[status], "content": content} for status in statuses}


def caller_of(request: Request) -> str:
    """The caller as an event tells of it: its address, and what it calls itself."""
    address = request.client.host if request.client else "?"
    agent = request.headers.get("user-agent", "")[:MAX_AGENT_CHARS]
    return one_line(f"{address} ({agent})" if agent else address)


def service_unavailable(why: str, after_s: int = 1) -> HTTPException:
    return HTTPException(503, why, headers={"Retry-After": str(after_s)})


def require_view(monitor: RunMonitor) -> RunView:
    """The newest one; not now, where Redis has not answered since control began."""
    if monitor.view is None:
        raise service_unavailable("Redis has not answered yet")
    return monitor.view
