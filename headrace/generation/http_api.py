"""A replica's HTTP API: health, status, hints about new weight versions, pause, resume, drain."""

from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI
from pydantic import BaseModel, Field

from headrace.common.http.service import new_app, require_token
from headrace.common.metrics.endpoint import mount_metrics
from headrace.generation.loop import Replica
from headrace.generation.prometheus import ReplicaMetrics
from headrace.generation.weights.peer_api import weights_router

Source = Annotated[str, Field(max_length=2000, pattern="^https?://")]


class WeightsHint(BaseModel):
    version: int = Field(ge=1, description="The published version; the replica fetches the newest that it finds.")
    sources: list[Source] = Field(
        [], max_length=64, description="URLs of replicas that have the version or are fetching it, in the order to ask."
    )


def make_app(replica: Replica, token: str) -> FastAPI:
    app = new_app("Headrace generation replica")
    parts = (replica.waits, replica.supervisor, replica.weights, replica.tickets, replica.rollouts)
    mount_metrics(app, ReplicaMetrics(replica.heartbeat, *parts))
    app.include_router(weights_router(replica.weights.file_server, token))
    guarded = [Depends(require_token(token))]

    def status() -> dict[str, Any]:
        return {"service": "generation", **msgspec.to_builtins(replica.heartbeat()), "waits": replica.waits.status()}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/status")
    async def get_status() -> dict[str, Any]:
        return status()

    @app.post("/weights", dependencies=guarded, status_code=202)
    async def weights(hint: WeightsHint) -> dict[str, int]:
        """A hint: the replica looks for a newer version now instead of at its next poll."""
        if hint.version > replica.weights.version:
            replica.weights.hint(hint.version, hint.sources)
        return {"serving": replica.weights.version}

    @app.post("/pause", dependencies=guarded)
    async def pause() -> dict[str, Any]:
        """Stops leasing tickets; those in flight are finished."""
        replica.status.is_paused = True
        return status()

    @app.post("/resume", dependencies=guarded)
    async def resume() -> dict[str, Any]:
        replica.status.is_paused = False
        return status()

    @app.post("/drain", dependencies=guarded)
    async def drain() -> dict[str, Any]:
        """Finishes or hands back the tickets in flight, then ends the replica. Episodes have `environment.drain_s`."""
        replica.drain()
        return status()

    return app
