"""The routes that change something: each writes an order, and answers with the run as it stands after it."""

from collections.abc import Awaitable
from typing import Annotated

import httpx
from fastapi import APIRouter, Depends, Path, Request
from starlette.exceptions import HTTPException

from headrace.common.config import RunConfig
from headrace.common.wire.desired_state import parse_launcher
from headrace.control.http.access import drawn, not_now, problems, who
from headrace.control.http.command_writer import Orders, Overtaken, Unreachable
from headrace.control.http.drain import NoAnswer, drain
from headrace.control.http.settings_response import settings_answer
from headrace.control.models import DesiredReplicas, Done, SettingsAnswer, SettingsChange
from headrace.control.view.run_monitor import Snapshot

_WITH_BODY = problems(400, 408, 409, 413, 422)
ReplicaName = Annotated[str, Path(min_length=1, max_length=200, examples=["generation-0"])]


def order_router(snapshot: Snapshot, orders: Orders, http: httpx.AsyncClient, token: str, guard: object) -> APIRouter:
    router = APIRouter(dependencies=[Depends(guard)], responses=problems(401, 503), tags=["orders"])  # type: ignore[arg-type]

    async def obeyed(writing: Awaitable[object], text: str) -> Done:
        """Writes an order and looks again."""
        await _written(writing)
        await snapshot.refresh()
        return Done(text=text, status=None if snapshot.picture is None else snapshot.picture.status)

    @router.post("/pause", operation_id="pause")
    async def pause(request: Request) -> Done:
        """No steps and no tickets, after the step in progress, until resumed."""
        return await obeyed(orders.pause(who(request)), "paused after the step in progress")

    @router.post("/resume", operation_id="resume")
    async def resume(request: Request) -> Done:
        return await obeyed(orders.resume(who(request)), "steps and tickets go on")

    @router.post("/checkpoint", operation_id="checkpoint")
    async def checkpoint(request: Request) -> Done:
        return await obeyed(orders.checkpoint(who(request)), "a checkpoint follows the step in progress")

    @router.post("/evaluate", operation_id="evaluate")
    async def evaluate(request: Request) -> Done:
        """Held-out accuracy of the newest weights, beside training."""
        return await obeyed(orders.evaluate(who(request)), "an evaluation follows the step in progress")

    @router.post("/stop", operation_id="stop")
    async def stop(request: Request) -> Done:
        """Ends the run after the step in progress, with a checkpoint; started again, it goes on from there."""
        return await obeyed(orders.stop(who(request)), "the run stops after the step in progress, with a checkpoint")

    @router.put("/replicas/desired", operation_id="order_replicas", responses=_WITH_BODY)
    async def order_replicas(request: Request, demand: DesiredReplicas) -> Done:
        """How many replicas the run's launcher keeps; 409 where none would obey, 422 where it lacks the GPUs."""
        number, launcher = demand.replicas, drawn(snapshot).status.replicas.launcher
        if number is not None and launcher is None:
            raise HTTPException(409, "no launcher keeps this run's replicas: nobody would obey")
        try:
            parse_launcher(launcher or "").refuse(number or 0)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        text = "no number is ordered any more" if number is None else f"{number} replicas ordered"
        return await obeyed(orders.scale(number, who(request)), text)

    @router.post("/replicas/{id}/drain", operation_id="drain_replica", responses=problems(404, 422))
    async def drain_replica(request: Request, id: ReplicaName) -> Done:
        """It finishes or hands back its tickets, then ends. A launcher starts another unless fewer are ordered."""
        found = [replica for replica in drawn(snapshot).replicas.replicas if replica.id == id]
        if not found:
            raise HTTPException(404, "no live replica has that name")
        try:
            await drain(http, found[0].url, token)
        except NoAnswer as error:
            raise not_now(str(error)) from error
        return await obeyed(orders.note_drain(id, who(request)), "it finishes or hands back its tickets, then ends")

    @router.patch("/settings", operation_id="change_settings", responses=_WITH_BODY, tags=["settings"])
    async def change_settings(request: Request, change: SettingsChange) -> SettingsAnswer:
        """Settings count from the learner's next step; all of a change or none of it."""
        config: RunConfig = drawn(snapshot).config
        try:
            await _written(orders.change_settings(config, change.settings, change.version, who(request)))
        except Overtaken as error:
            raise HTTPException(409, str(error)) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        await snapshot.refresh()
        return settings_answer(drawn(snapshot))

    return router


async def _written(writing: Awaitable[object]) -> None:
    try:
        await writing
    except Unreachable as error:
        raise not_now(str(error)) from error
