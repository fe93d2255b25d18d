"""docs/running.md names what exists: every alert, and commands, settings and files that are there."""

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from headrace.common.config import RunConfig
from headrace.launcher.__main__ import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_every_alert_is_explained() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    explained = re.findall(
        r"^\| `(Headrace\w+)` \| (.{20,}) \| (.{20,}) \|$", (ROOT / "docs/running.md").read_text(), re.M
    )
    assert [name for name, _, _ in explained] == alerts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_settings_and_files_are_there(page: Path) -> None:
    text = page.read_text()
    commands = set(re.findall(r"[`\n(]headrace ([a-z][a-z-]*)", text))
    assert commands <= set(get_command(app).commands), "commands"  # type: ignore[attr-defined]
    for section, field in re.findall(r"`(learner|generation|optimizer|evaluation|sampling)\.(\w+)", text):
        assert field in type(RunConfig.model_fields[section].get_default()).model_fields, f"{section}.{field}"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
