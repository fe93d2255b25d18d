"""The OpenAPI document for generated clients: with problem details as errors, and marks on what needs the token."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from headrace.control.models.bodies import Problem

SCHEME = "token"
DESCRIPTION = """Observe and control a Headrace run. Requests that change something need the run's bearer token.

Errors are problem details (RFC 9457). All data comes from one view of the run that is at most half a second old.
"""
OPEN = {"healthz"}
"""Operations that never need the token."""


def build_openapi(app: FastAPI, require_token_for_reads: bool) -> dict[str, Any]:
    """Generated once and cached, as FastAPI does."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version="1", description=DESCRIPTION, routes=app.routes)
        schemas = document["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["Problem"] = Problem.model_json_schema()
        document["components"]["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
        for path in document["paths"].values():
            for method, operation in path.items():
                operation["security"] = _security(method, operation, require_token_for_reads)
        app.openapi_schema = document
    return app.openapi_schema


def _security(method: str, operation: dict[str, Any], require_token_for_reads: bool) -> list[dict[str, list[str]]]:
    is_guarded = method != "get" or operation["operationId"] == "check_token" or require_token_for_reads
    return [{SCHEME: []}] if is_guarded and operation["operationId"] not in OPEN else []
