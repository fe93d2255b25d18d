"""`headrace init`: writes a recipe and a task module of one's own to begin with.

The texts are those of headrace/launcher/templates. Nothing that is already there is overwritten.
"""

import shlex
from pathlib import Path

TEMPLATES = Path(__file__).parents[1] / "templates"
FILES = ("recipe.yaml", "my_task.py")


def init(folder: Path) -> list[Path]:
    """Writes the files and returns their paths. Raises `ValueError` if one of them exists."""
    paths = [folder / name for name in FILES]
    if existing := [str(path) for path in paths if path.exists()]:
        raise ValueError(
            f"{', '.join(existing)}: already there; expected another folder, or none of {', '.join(FILES)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.write_text(template(path.name))
    return paths


def next_commands(folder: Path) -> list[str]:
    """The commands to run after `headrace init`."""
    recipe = shlex.quote(str(folder / "recipe.yaml"))
    return [f"headrace check {recipe}", f"headrace up {recipe} --run first", "headrace status --watch --run first"]


def template(name: str) -> str:
    return (TEMPLATES / name).read_text()
