"""Metrics and REST endpoints that documents, alerts and dashboards name are those that the services have."""

import ast
import re
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest

from headrace.common.metrics.endpoint import mount_metrics
from headrace.common.metrics.steps import EVALUATION_TEXTS, TEXTS, metric_name
from headrace.control.assembly import openapi_document
from headrace.generation.http_api import make_app as make_replica_app
from headrace.learner.reporting.http_api import make_app as make_learner_app

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md"), ROOT / "README.md"]
CONFIGS = sorted(path for end in ("*.yml", "*.yaml", "*.json") for path in (ROOT / "deploy").rglob(end))
RECORDED = {"headrace_active"}
"""Recording rules of the alerts."""
Endpoints = set[tuple[str, str]]


@cache
def exported_metrics() -> set[str]:
    """The name of every family that a service exports; of a histogram also those of its samples."""
    names = {metric_name(name) for name in TEXTS} | {metric_name(name, "headrace_eval") for name in EVALUATION_TEXTS}
    for path in (ROOT / "headrace").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and name.value.startswith("headrace_"):
                ends = ("", "_bucket", "_count", "_sum") if node.func.attr == "histogram" else ("",)
                names |= {f"{name.value}{end}" for end in ends}
    return names


def test_there_are_metrics_to_check() -> None:
    assert {"headrace_completed_steps", "headrace_eval_held_out", "headrace_step_wait_seconds"} <= exported_metrics()
    assert len(exported_metrics()) > 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_metrics_in_documents_exist(page: Path) -> None:
    named = set(re.findall(r"`(headrace_[a-z0-9_]+)", page.read_text()))
    assert named <= exported_metrics()


def test_metrics_in_alerts_and_dashboards_exist() -> None:
    named = {name for path in CONFIGS for name in re.findall(r"\bheadrace_[a-z0-9_]+", path.read_text())}
    assert len(named) > 80 and named - RECORDED <= exported_metrics()


def endpoints_in_table(text: str, column: int = 1) -> Endpoints:
    """Of the rows whose cell in `column` is not empty. A path without a method has the one before it."""
    found: Endpoints = set()
    for row in re.findall(r"^\| (`(?:GET|POST|PUT|PATCH) .*) \|$", text, re.M):
        cells = [cell.strip() for cell in row.split("|")]
        method = ""
        for given, path in re.findall(r"`(?:([A-Z]+) )?(/[^`]*)`", cells[0]):
            method = given or method
            if len(cells) > column and cells[column]:
                found.add((method, path))
    return found


def endpoints_of(document: dict[str, dict[str, dict[str, object]]]) -> Endpoints:
    return {(method.upper(), path) for path, item in document["paths"].items() for method in item}


def control_endpoints() -> Endpoints:
    return endpoints_of(openapi_document()) | {("GET", "/"), ("GET", "/openapi.json")}


def learner_endpoints() -> Endpoints:
    app = make_learner_app(ROOT, dict, Mock(), "token")
    mount_metrics(app, list)
    return endpoints_of(app.openapi())


def replica_endpoints() -> Endpoints:
    return endpoints_of(make_replica_app(Mock(), "token").openapi())


def test_the_table_of_the_readme_has_the_endpoints_of_control() -> None:
    assert endpoints_in_table((ROOT / "README.md").read_text()) == control_endpoints()


def test_the_tables_of_the_api_have_the_endpoints_of_each_service() -> None:
    _, of_control, of_others = (ROOT / "docs" / "api.md").read_text().split("| endpoint |")
    assert endpoints_in_table(of_control) == control_endpoints()
    assert endpoints_in_table(of_others, 1) == learner_endpoints()
    assert endpoints_in_table(of_others, 2) == replica_endpoints()
