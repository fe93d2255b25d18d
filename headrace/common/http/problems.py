"""Error responses as problem details (RFC 9457); they do not repeat the content of the request."""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
MAX_DETAIL_CHARS = 1000


def problem_response(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    shown = detail[:MAX_DETAIL_CHARS].encode(errors="backslashreplace").decode()
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": shown}
    return JSONResponse(body, status, headers=headers, media_type=MEDIA_TYPE)


def add_problem_handlers(app: FastAPI) -> None:
    """Handles errors raised by routes, invalid requests and unexpected exceptions."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        told = [f"{'.'.join(str(part)[:60] for part in one['loc'][:8])}: {one['msg']}" for one in error.errors()[:5]]
        return problem_response(422, "; ".join(told))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return problem_response(500, "this call failed; the reason is in the service's log")
