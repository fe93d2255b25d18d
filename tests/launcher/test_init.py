"""`headrace init`: what it writes works as it is, and is what the documentation shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.launcher.commands.init import FILES, init, template
from tests.support.guard import GUARD_S

ROOT = Path(__file__).parents[2]


def headrace(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "headrace.launcher", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=GUARD_S)


def test_what_init_writes_passes_check_in_an_empty_folder(tmp_path: Path) -> None:
    made = headrace("init", "mine", cwd=tmp_path)
    assert made.returncode == 0, made
    assert {path.name for path in (tmp_path / "mine").iterdir()} == set(FILES)
    assert "\n  headrace check mine/recipe.yaml\n  headrace up mine/recipe.yaml --run first\n" in made.stdout
    checked = headrace("check", "mine/recipe.yaml", cwd=tmp_path)
    assert checked.returncode == 0, checked
    assert "my_task:MyTask" in checked.stdout and "  train prompts tried: " in checked.stdout


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text("mine")
    with pytest.raises(ValueError, match=r"my_task\.py: already there; expected another folder"):
        init(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"my_task.py": "mine"}


@pytest.mark.parametrize("name", FILES)
def test_the_documentation_shows_what_init_writes(name: str) -> None:
    language = "yaml" if name.endswith(".yaml") else "python"
    assert f"```{language}\n{template(name)}```\n" in (ROOT / "docs" / "tasks.md").read_text()
