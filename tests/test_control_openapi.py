"""The OpenAPI document says what control does: schemathesis finds no 5xx and no undocumented answer."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from common.http_service import bearer
from common.keys import Keys
from tests.controls import TOKEN, Control, a_control
from tests.fake_services import ROOT
from tests.seeded_run import seed_run

OPEN_ENDED = {"events"}
"""A stream has no end to wait for; it has tests of its own."""
KEYS = Keys("test-control-openapi")


@pytest.fixture(scope="module")
def control(redis_url: str) -> Iterator[Control]:
    with redis.Redis.from_url(redis_url) as client:
        seed_run(client, KEYS)
    with a_control(redis_url, KEYS) as served:
        yield served


@pytest.fixture(scope="module")
def document(control: Control) -> dict[str, Any]:
    found: dict[str, Any] = control.http.get("/openapi.json").json()
    return found


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schemathesis_finds_no_5xx_and_no_undocumented_answer(
    control: Control, document: dict[str, Any], mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    tried = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        name = operation.definition.raw["operationId"]
        has_input = bool(list(operation.iter_parameters()) or operation.body)
        if name in OPEN_ENDED or (mode is GenerationMode.NEGATIVE and not has_input):
            continue

        @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def every_answer_is_documented(case: Any) -> None:
            case.call_and_validate(base_url=control.url, headers=bearer(TOKEN), timeout=30)

        every_answer_is_documented()
        tried.add(name)
    assert {"change_settings", "order_replicas", "history", "groups", "group", "drain_replica"} <= tried


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_every_operation_is_named_told_and_says_what_can_go_wrong(document: dict[str, Any]) -> None:
    found = list(operations(document))
    assert len(found) >= 20
    names = [operation["operationId"] for _, _, operation in found]
    assert len(set(names)) == len(names) and "change_settings" in names
    for method, path, operation in found:
        answers = operation["responses"]
        assert operation.get("description") or operation.get("summary"), path
        errors = {status for status in answers if status[0] in "45"}
        assert operation["operationId"] == "healthz" or "401" in errors, path
        assert all(answers[status]["content"].keys() == {"application/problem+json"} for status in errors), path
        assert ("{" in path) <= ("404" in errors), path
        assert ("requestBody" in operation) <= ({"400", "413", "422"} <= errors), path
        assert bool(operation["security"]) == (method != "get" or path == "/auth"), path


def test_every_reference_of_the_document_is_there(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= schemas.keys() and "Problem" in used and "HTTPValidationError" not in text


def test_the_document_is_printed_without_a_run(document: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "services.control", "--openapi"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(printed.stdout) == document
