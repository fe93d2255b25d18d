"""The learner's HTTP service: health, status, files of weight versions, and the loop's switches.

It runs in a thread beside the loop and only reads the status or sets a switch; the loop applies switches between
steps. A command is answered once Redis has it. If that takes too long, the response lists it in `unpersisted_commands`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from headrace.common.http.service import new_app, require_token
from headrace.common.weights.files import MANIFEST_FILE, stored_versions, version_file, version_folder
from headrace.learner.steering.switches import Switches


def make_app(
    weights_root: Path,
    status: Callable[[], dict[str, Any]],
    switches: Switches,
    token: str,
    weights_in_memory: Path | None = None,
) -> FastAPI:
    """Version files are looked up in `weights_root`, then in `weights_in_memory`."""
    app = new_app("Headrace learner")
    guarded = [Depends(require_token(token))]

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/status")
    def get_status() -> dict[str, Any]:
        return status()

    @app.get("/weights/latest", dependencies=guarded)
    def latest() -> FileResponse:
        """The manifest of the newest version."""
        newest = max(stored_versions(weights_root), default=None)
        if newest is None:
            raise HTTPException(404, "no weight version has been published yet")
        return FileResponse(version_folder(weights_root, newest) / MANIFEST_FILE)

    @app.get("/weights/{version}/{name}", dependencies=guarded)
    def weights_file(version: int, name: str) -> FileResponse:
        """A file of a version, or a byte range of it."""
        path = version_file(weights_root, version, name)
        if path is None and weights_in_memory is not None:
            path = version_file(weights_in_memory, version, name)
        if path is None:
            raise HTTPException(404, f"weight version {version} has no file {name!r} here")
        return FileResponse(path)

    @app.post("/pause", dependencies=guarded)
    def pause() -> dict[str, Any]:
        switches.pause()
        return status_once_persisted()

    @app.post("/resume", dependencies=guarded)
    def resume() -> dict[str, Any]:
        switches.resume()
        return status_once_persisted()

    @app.post("/checkpoint", dependencies=guarded)
    def checkpoint() -> dict[str, Any]:
        switches.request_checkpoint()
        return status_once_persisted()

    @app.post("/stop", dependencies=guarded)
    def stop() -> dict[str, Any]:
        """Ends the run after the step in progress, with a checkpoint."""
        switches.request_stop()
        return status_once_persisted()

    def status_once_persisted() -> dict[str, Any]:
        switches.wait_until_persisted()
        return status()

    return app
