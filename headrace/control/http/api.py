"""The app and its read endpoints. They answer from memory; the larger responses are encoded once for all readers."""

from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from starlette.exceptions import HTTPException

from headrace.common.http.service import new_app, require_token
from headrace.common.metrics.endpoint import mount_metrics
from headrace.common.wire import DecidedState, TicketKind
from headrace.control.http.access import error_responses, require_view, service_unavailable
from headrace.control.http.command_routes import ReplicaName, command_router
from headrace.control.http.command_writer import CommandWriter
from headrace.control.http.openapi import build_openapi
from headrace.control.http.page import page_router
from headrace.control.http.prometheus import ControlMetrics
from headrace.control.http.request_counts import RequestCounter, RequestTotals
from headrace.control.http.settings_response import settings_response
from headrace.control.models.commands import SettingsResponse
from headrace.control.models.groups import GroupDetail, Groups, GroupSummary
from headrace.control.models.history import Evaluation, Events, History
from headrace.control.models.replicas import Replica, Replicas
from headrace.control.models.status import Status
from headrace.control.view.event_stream import EventStream, TooManySubscribers
from headrace.control.view.run_monitor import RunMonitor

Cursor = Annotated[str, Query(pattern=r"^([0-9]{1,15}-[0-9]{1,15})?$", description="`cursor` of an earlier response.")]
GroupName = Annotated[str, Path(min_length=1, max_length=200, examples=["0-17", "eval-41-3"])]


def make_app(
    monitor: RunMonitor, commands: CommandWriter, http: httpx.AsyncClient, token: str, require_token_for_reads: bool
) -> FastAPI:
    app = new_app("Headrace control", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.openapi = lambda: build_openapi(app, require_token_for_reads)  # type: ignore[method-assign]
    require_valid_token = require_token(token)
    app.include_router(page_router())

    @app.get("/healthz", operation_id="healthz", tags=["status"])
    async def healthz() -> dict[str, str]:
        """Control is running. Needs no token."""
        return {"status": "ok"}

    @app.get("/auth", operation_id="check_token", tags=["status"], status_code=204, responses=error_responses(401))
    async def check_token(request: Request) -> Response:
        """Checks the token of this request."""
        await require_valid_token(request)
        return Response(status_code=204)

    reading = [Depends(require_valid_token)] if require_token_for_reads else []
    requests = RequestTotals()
    app.add_middleware(RequestCounter, totals=requests)
    mount_metrics(
        app, ControlMetrics(monitor, requests), tags=["status"], dependencies=reading, responses=error_responses(401)
    )
    app.include_router(_status_router(monitor), dependencies=reading, responses=error_responses(401, 503))
    app.include_router(_history_router(monitor), dependencies=reading, responses=error_responses(401, 503))
    app.include_router(command_router(monitor, commands, http, token, require_valid_token))
    return app


def _status_router(monitor: RunMonitor) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/status", operation_id="status", response_model=Status)
    async def status() -> Response:
        """The state of the whole run, at most half a second old."""
        return _json(require_view(monitor).status_json)

    @router.get("/replicas", operation_id="replicas", response_model=Replicas)
    async def replicas() -> Response:
        """The live replicas, and how many are desired and advised."""
        return _json(require_view(monitor).replicas_json)

    @router.get("/replicas/{id}", operation_id="replica", responses=error_responses(404, 422))
    async def replica(id: ReplicaName) -> Replica:
        for one in require_view(monitor).replicas.replicas:
            if one.id == id:
                return one
        raise HTTPException(404, "no live replica has this id")

    @router.get("/settings", operation_id="settings", tags=["settings"])
    async def settings() -> SettingsResponse:
        return settings_response(require_view(monitor))

    @router.get("/events", operation_id="events", response_class=Response, responses=_EVENT_STREAM)
    async def events() -> Response:
        """Server-sent events: `status`, `replicas`, `step`, `evaluation`, `group`, `event`, each with JSON."""
        try:
            return EventStream(monitor.hub, monitor.hub.subscribe(*monitor.initial_messages()))
        except TooManySubscribers as error:
            raise service_unavailable(str(error), after_s=30) from error

    return router


_EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": (
            "`status` (Status) and `replicas` (Replicas) on connect and on change, at most once a second; `step` (a "
            "row with the columns of History.steps; it replaces rows of its step and all later ones); `evaluation` "
            "(Evaluation); `group` (GroupSummary); `event` (Event). A client that falls behind is disconnected."
        ),
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def _history_router(monitor: RunMonitor) -> APIRouter:
    router = APIRouter(tags=["rows"])

    @router.get("/history", operation_id="history", response_model=History, responses=error_responses(422))
    async def history(after: Cursor = "", max_points: Annotated[int, Query(ge=1, le=5000)] = 1000) -> Response:
        """The numbers of every step, or of those after a cursor."""
        require_view(monitor)
        return _json(monitor.history.encoded_response(after, max_points))

    @router.get("/evaluations", operation_id="evaluations")
    async def evaluations() -> list[Evaluation]:
        """All evaluations, in the order of their steps."""
        require_view(monitor)
        return monitor.history.evaluations

    @router.get("/events/recent", operation_id="recent_events", response_model=Events, responses=error_responses(422))
    async def recent_events(limit: Annotated[int, Query(ge=1, le=700)] = 100) -> Events:
        """Recent events, without steps."""
        require_view(monitor)
        return Events(events=monitor.event_log.newest(limit))

    @router.get("/groups", operation_id="groups", responses=error_responses(422))
    async def groups(
        kind: TicketKind | None = None,
        state: DecidedState | None = None,
        step: Annotated[int | None, Query(ge=0, le=2**53 - 1)] = None,
        replica: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=256)] = 50,
    ) -> Groups:
        """A sample of recent groups, the newest first."""
        require_view(monitor)
        wanted = {"kind": kind, "state": state, "step": step, "replica": replica}
        asked = {name: value for name, value in wanted.items() if value is not None}

        def is_wanted(summary: GroupSummary) -> bool:
            return all(getattr(summary, name) == value for name, value in asked.items())

        found = [summary for summary, _ in zip(monitor.groups.newest(is_wanted), range(limit), strict=False)]
        return Groups(groups=found, num_kept=len(monitor.groups))

    @router.get("/groups/{id}", operation_id="group", responses=error_responses(404, 422))
    async def group(id: GroupName) -> GroupDetail:
        """One group token by token: weight versions, and the log-probabilities of engine and learner."""
        require_view(monitor)
        if (detail := monitor.groups.detail(id)) is None:
            raise HTTPException(404, "no such group among those that control keeps")
        return detail

    return router


def _json(payload: bytes) -> Response:
    return Response(payload, media_type="application/json", headers={"Cache-Control": "no-store"})
