"""`headrace init`: writes a recipe and a task module of one's own to begin with.

The texts are those of headrace/launcher/templates. Nothing that is already there is overwritten.
"""

import shlex
from pathlib import Path

TEMPLATES = Path(__file__).parents[1] / "templates"
FILES = {"task": ("recipe.yaml", "my_task.py"), "environment": ("recipe.yaml", "my_environment.py")}
"""By the kind of task."""


def init(folder: Path, kind: str) -> list[Path]:
    """Writes the files of a kind of task and returns their paths. Raises `ValueError` if one of them exists."""
    names = FILES[kind]
    if existing := [str(folder / name) for name in names if (folder / name).exists()]:
        raise ValueError(
            f"{', '.join(existing)}: already there; expected another folder, or none of {', '.join(names)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(template(kind, name))
    return [folder / name for name in names]


def next_commands(folder: Path) -> list[str]:
    """The commands to run after `headrace init`."""
    recipe = shlex.quote(str(folder / "recipe.yaml"))
    return [
        f"headrace check {recipe}",
        f"headrace try {recipe}",
        f"headrace up {recipe} --run first",
        "headrace status --watch --run first",
    ]


def template(kind: str, name: str) -> str:
    return (TEMPLATES / kind / name).read_text()
