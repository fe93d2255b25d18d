"""`headrace init`: writes a recipe and a task module of one's own to begin with.

The texts are those of headrace/launcher/templates. Only the path of the demo policy is filled in. Nothing that is
already there is overwritten.
"""

import shlex
from pathlib import Path

import headrace

TEMPLATES = Path(__file__).parents[1] / "templates"
FILES = ("recipe.yaml", "my_task.py")
POLICY_IN_TEMPLATE = "assets/demo-policy"
"""The path of the demo policy in the recipe's template, as it is in a checkout."""


def init(folder: Path) -> list[Path]:
    """Writes the files and returns their paths. Raises `ValueError` if one of them exists."""
    paths = [folder / name for name in FILES]
    if existing := [str(path) for path in paths if path.exists()]:
        raise ValueError(
            f"{', '.join(existing)}: already there; expected another folder, or none of {', '.join(FILES)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        path.write_text(template(path.name).replace(POLICY_IN_TEMPLATE, str(demo_policy())))
    return paths


def next_commands(folder: Path) -> list[str]:
    """What to type after `headrace init`."""
    recipe = shlex.quote(str(folder / "recipe.yaml"))
    return [f"headrace check {recipe}", f"headrace up {recipe} --run first", "headrace status --watch --run first"]


def template(name: str) -> str:
    return (TEMPLATES / name).read_text()


def demo_policy() -> Path:
    """The folder of the demo policy: in the installed package, else in the checkout. Raises `ValueError`."""
    package = Path(headrace.__file__).parent
    for folder in (package / POLICY_IN_TEMPLATE, package.parent / POLICY_IN_TEMPLATE):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"the demo policy is not in {package}; headrace make-demo-policy makes it in {POLICY_IN_TEMPLATE}")
