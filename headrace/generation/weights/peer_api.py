"""Serves a replica's weight files to other replicas, including files that it is still downloading.

The learner sends only a few replicas to itself, and the others to those. It hints all of them at the same time, so a
replica that is asked for a version before its own download has started lets the request wait for `WAIT_S`.
"""

import asyncio
import re
import time

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.exceptions import HTTPException

from headrace.common.http.service import require_token
from headrace.common.weights.files import version_file
from headrace.generation.weights.downloads import Download, Fetcher
from headrace.generation.weights.local_weights import LocalWeights

WAIT_S = 2.0
POLL_S = 0.02


class WeightFileServer:
    """Answers requests for files of the local versions and of current downloads."""

    def __init__(self, local: LocalWeights, fetcher: Fetcher) -> None:
        self._local = local
        self._fetcher = fetcher

    async def response(self, version: int, name: str, byte_range: str) -> Response:
        """The file, or its `byte_range`. Raises `HTTPException` 404 if the file does not appear within `WAIT_S`, 416
        for a range beyond its end."""
        current = self._local.current.manifest.version if self._local.current else 0
        deadline_s = time.monotonic() + (WAIT_S if version > current else 0.0)
        while True:
            if download := self._fetcher.downloads.get((version, name)):
                return self._stream(download, byte_range)
            if path := version_file(self._local.root, version, name):
                return FileResponse(path)
            if time.monotonic() >= deadline_s:
                raise HTTPException(404, f"weight version {version} has no file {name!r} here")
            await asyncio.sleep(POLL_S)

    def _stream(self, download: Download, byte_range: str) -> Response:
        asked = re.fullmatch(r"bytes=([0-9]{1,15})-", byte_range)
        first = int(asked[1]) if asked else 0
        if first > download.num_bytes:
            raise HTTPException(416, f"the file has {download.num_bytes} bytes")
        headers = {"Content-Length": str(download.num_bytes - first)}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{download.num_bytes - 1}/{download.num_bytes}"
        return StreamingResponse(download.read(first), 206 if asked else 200, headers, "application/octet-stream")


def weights_router(file_server: WeightFileServer, token: str) -> APIRouter:
    router = APIRouter(dependencies=[Depends(require_token(token))])

    @router.get("/weights/{version}/{name}")
    async def weights_file(version: int, name: str, request: Request) -> Response:
        """A file of a version, or a range of it, for other replicas; it may still be downloading."""
        return await file_server.response(version, name, request.headers.get("range", ""))

    return router
