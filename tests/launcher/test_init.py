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


@pytest.mark.parametrize(
    ("kind", "options", "task"),
    [("task", (), "my_task:MyTask"), ("environment", ("--environment",), "my_environment:MyEnvironment")],
)
def test_what_init_writes_passes_check_in_an_empty_folder(
    kind: str, options: tuple[str, ...], task: str, tmp_path: Path
) -> None:
    made = headrace("init", "mine", *options, cwd=tmp_path)
    assert made.returncode == 0, made
    assert {path.name for path in (tmp_path / "mine").iterdir()} == set(FILES[kind])
    assert "\n  headrace check mine/recipe.yaml\n" in made.stdout
    assert "\n  headrace up mine/recipe.yaml --run first\n" in made.stdout
    checked = headrace("check", "mine/recipe.yaml", cwd=tmp_path)
    assert checked.returncode == 0, checked
    assert task in checked.stdout and "  train prompts tried: " in checked.stdout


@pytest.mark.slow
def test_the_environment_that_init_writes_is_played_by_its_model(tmp_path: Path) -> None:
    assert headrace("init", "mine", "--environment", cwd=tmp_path).returncode == 0
    played = headrace("try", "mine/recipe.yaml", "--num", "2", cwd=tmp_path)
    assert played.returncode == 0, played
    assert played.stdout.count("\n   reward ") == 2 and "Lena thinks of a number from 1 to 63." in played.stdout
    assert ", 1 segment, " in played.stdout and "\n2 episodes: reward " in played.stdout


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text("mine")
    with pytest.raises(ValueError, match=r"my_task\.py: already there; expected another folder"):
        init(tmp_path, "task")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"my_task.py": "mine"}


@pytest.mark.parametrize(
    ("kind", "name", "page"),
    [
        ("task", "my_task.py", "tasks.md"),
        ("task", "recipe.yaml", "tasks.md"),
        ("environment", "my_environment.py", "environments.md"),
    ],
)
def test_the_documentation_shows_what_init_writes(kind: str, name: str, page: str) -> None:
    language = "yaml" if name.endswith(".yaml") else "python"
    assert f"```{language}\n{template(kind, name)}```\n" in (ROOT / "docs" / page).read_text()
