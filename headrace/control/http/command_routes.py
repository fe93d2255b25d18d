"""The endpoints that change a run: each writes a command to Redis and responds with the status after it."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Depends, Path, Request
from starlette.exceptions import HTTPException

from headrace.common.config import RunConfig
from headrace.common.wire.desired_state import parse_launcher
from headrace.control.http.access import caller_of, error_responses, require_view, service_unavailable
from headrace.control.http.command_writer import CommandWriter, RedisUnavailable, VersionConflict
from headrace.control.http.drain import DrainFailed, drain
from headrace.control.http.settings_response import settings_response
from headrace.control.models.commands import CommandAccepted, DesiredReplicas, SettingsChange, SettingsResponse
from headrace.control.view.run_monitor import RunMonitor

_WITH_BODY = error_responses(400, 408, 409, 413, 422)
ReplicaName = Annotated[str, Path(min_length=1, max_length=200, examples=["generation-0"])]


def command_router(
    monitor: RunMonitor,
    commands: CommandWriter,
    http: httpx.AsyncClient,
    token: str,
    require_valid_token: Callable[..., Any],
) -> APIRouter:
    router = APIRouter(
        dependencies=[Depends(require_valid_token)], responses=error_responses(401, 503), tags=["commands"]
    )

    async def accepted(writing: Awaitable[object], text: str) -> CommandAccepted:
        """Writes a command and refreshes the view."""
        await _write_or_503(writing)
        await monitor.refresh()
        return CommandAccepted(text=text, status=None if monitor.view is None else monitor.view.status)

    @router.post("/pause", operation_id="pause")
    async def pause(request: Request) -> CommandAccepted:
        """Pauses the run after the step in progress: no steps and no tickets until it is resumed."""
        return await accepted(commands.pause(caller_of(request)), "paused after the step in progress")

    @router.post("/resume", operation_id="resume")
    async def resume(request: Request) -> CommandAccepted:
        """Resumes a paused run."""
        return await accepted(commands.resume(caller_of(request)), "steps and tickets continue")

    @router.post("/checkpoint", operation_id="checkpoint")
    async def checkpoint(request: Request) -> CommandAccepted:
        """Writes a checkpoint after the step in progress."""
        return await accepted(commands.checkpoint(caller_of(request)), "a checkpoint follows the step in progress")

    @router.post("/evaluations", operation_id="request_evaluation")
    async def request_evaluation(request: Request) -> CommandAccepted:
        """Evaluates the newest weights on held-out prompts while training goes on."""
        return await accepted(commands.evaluate(caller_of(request)), "an evaluation follows the step in progress")

    @router.post("/stop", operation_id="stop")
    async def stop(request: Request) -> CommandAccepted:
        """Ends the run after the step in progress, with a checkpoint. A later start continues from there."""
        return await accepted(
            commands.stop(caller_of(request)), "the run stops after the step in progress, with a checkpoint"
        )

    @router.put("/replicas/desired", operation_id="set_desired_replicas", responses=_WITH_BODY)
    async def set_desired_replicas(request: Request, body: DesiredReplicas) -> CommandAccepted:
        """Sets how many replicas the launcher keeps running: 409 without a launcher, 422 if it lacks the GPUs."""
        number, launcher = body.replicas, require_view(monitor).status.replicas.launcher
        if number is not None and launcher is None:
            raise HTTPException(
                409, "no launcher keeps the replicas of this run, so a target would have no effect; start headrace up"
            )
        try:
            parse_launcher(launcher or "").check_capacity(number or 0)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        text = "the replica target is cleared" if number is None else f"the replica target is {number}"
        return await accepted(commands.scale(number, caller_of(request)), text)

    @router.post("/replicas/{id}/drain", operation_id="drain_replica", responses=error_responses(404, 422))
    async def drain_replica(request: Request, id: ReplicaName) -> CommandAccepted:
        """The replica finishes or hands back its tickets, then exits. The launcher replaces it up to the target."""
        found = [replica for replica in require_view(monitor).replicas.replicas if replica.id == id]
        if not found:
            raise HTTPException(404, "no live replica has this id")
        try:
            await drain(http, found[0].url, token)
        except DrainFailed as error:
            raise service_unavailable(str(error)) from error
        return await accepted(
            commands.record_drain(id, caller_of(request)), "the replica finishes or hands back its tickets, then exits"
        )

    @router.patch("/settings", operation_id="change_settings", responses=_WITH_BODY, tags=["settings"])
    async def change_settings(request: Request, change: SettingsChange) -> SettingsResponse:
        """Changes settings from the learner's next step: all of the given ones or none."""
        config: RunConfig = require_view(monitor).config
        try:
            await _write_or_503(commands.change_settings(config, change.settings, change.version, caller_of(request)))
        except VersionConflict as error:
            raise HTTPException(409, str(error)) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        await monitor.refresh()
        return settings_response(require_view(monitor))

    return router


async def _write_or_503(writing: Awaitable[object]) -> None:
    try:
        await writing
    except RedisUnavailable as error:
        raise service_unavailable(str(error)) from error
