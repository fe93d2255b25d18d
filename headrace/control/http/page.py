"""Serves the live page: files of one folder. Its security policy lets it load nothing from elsewhere."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

PAGE = Path(__file__).parents[1] / "page"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".json": "application/json",
}


def page_router(folder: Path = PAGE) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> FileResponse:
        return _file(folder, "index.html")

    @router.get("/page/{name:path}")
    async def page_file(name: str) -> FileResponse:
        return _file(folder, name)

    return router


def _file(folder: Path, name: str) -> FileResponse:
    """Responds with 404 unless it is a file of a known type below `folder`."""
    try:
        path = (folder / name).resolve()
        is_ours = path.is_relative_to(folder.resolve()) and path.suffix in TYPES and path.is_file()
    except (OSError, ValueError):  # not a valid file name
        is_ours = False
    if not is_ours:
        raise HTTPException(404, "the page has no such file")
    return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)
