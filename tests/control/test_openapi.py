"""The OpenAPI document matches control: schemathesis finds no 5xx and no undocumented response."""

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
from schemathesis.specs.openapi.checks import positive_data_acceptance

from headrace.common.http.addresses import bearer_header
from headrace.common.redis.keys import Keys
from tests.support.control_service import TOKEN, Control, a_control
from tests.support.fake_services import ROOT
from tests.support.fake_sglang import a_fake_sglang
from tests.support.guard import GUARD_S
from tests.support.seeded_run import seed_run

OPEN_ENDED = {"events"}
"""A stream has no end to wait for; it has tests of its own."""
HELD_AGAINST_MORE = {"change_settings"}
"""Against the run's configuration, too: not all that fits the document is taken."""
KEYS = Keys("test-control-openapi")


@pytest.fixture(scope="module")
def control(redis_url: str) -> Iterator[Control]:
    with a_fake_sglang() as replica, redis.Redis.from_url(redis_url) as client:
        replica.replies["/drain"] = 200, {}
        seed_run(client, KEYS, replica_url=replica.url)
        with a_control(redis_url, KEYS) as served:
            yield served


@pytest.fixture(scope="module")
def openapi_document(control: Control) -> dict[str, Any]:
    found: dict[str, Any] = control.http.get("/openapi.json").json()
    return found


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schemathesis_finds_no_5xx_and_no_undocumented_answer(
    control: Control, openapi_document: dict[str, Any], mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(openapi_document)
    tried = set()
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        name = operation.definition.raw["operationId"]
        has_input = bool(list(operation.iter_parameters()) or operation.body)
        if name in OPEN_ENDED or (mode is GenerationMode.NEGATIVE and not has_input):
            continue

        _try(operation, mode, control.url, [positive_data_acceptance] if name in HELD_AGAINST_MORE else [])
        tried.add(name)
    assert {"change_settings", "set_desired_replicas", "history", "groups", "group", "drain_replica"} <= tried


def _try(operation: Any, mode: GenerationMode, url: str, excluded: list[Any]) -> None:
    @settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def every_answer_is_documented(case: Any) -> None:
        case.call_and_validate(base_url=url, headers=bearer_header(TOKEN), timeout=GUARD_S, excluded_checks=excluded)

    every_answer_is_documented()


def operations(openapi_document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in openapi_document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_every_operation_has_a_name_a_description_and_errors(openapi_document: dict[str, Any]) -> None:
    found = list(operations(openapi_document))
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


def test_every_reference_of_the_document_resolves(openapi_document: dict[str, Any]) -> None:
    schemas = openapi_document["components"]["schemas"]
    text = json.dumps(openapi_document)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= schemas.keys() and "Problem" in used and "HTTPValidationError" not in text


def test_the_document_is_printed_without_a_run(openapi_document: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "headrace.control", "--openapi"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=GUARD_S)
    assert json.loads(printed.stdout) == openapi_document
