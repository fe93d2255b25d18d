"""The OpenAPI document as generated clients need it: errors are problems, and it is said what needs the token."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from headrace.control.models.base import Problem

SCHEME = "token"
DESCRIPTION = """The front door of a Headrace run. What changes something needs the run's token, as a bearer.

Errors are problem details (RFC 9457). Everything that is read comes from one snapshot, at most half a second old.
"""
OPEN = {"healthz"}
"""Operations that never ask for the token."""


def openapi_of(app: FastAPI, protect_reads: bool) -> dict[str, Any]:
    """Made once and kept, as FastAPI does."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version="1", description=DESCRIPTION, routes=app.routes)
        schemas = document["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["Problem"] = Problem.model_json_schema()
        document["components"]["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
        for path in document["paths"].values():
            for method, operation in path.items():
                operation["security"] = _security(method, operation, protect_reads)
        app.openapi_schema = document
    return app.openapi_schema


def _security(method: str, operation: dict[str, Any], protect_reads: bool) -> list[dict[str, list[str]]]:
    is_guarded = method != "get" or operation["operationId"] == "check_token" or protect_reads
    return [{SCHEME: []}] if is_guarded and operation["operationId"] not in OPEN else []
