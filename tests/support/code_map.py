"""Makes docs/code-map.md from the docstrings of packages and modules: `python -m tests.support.code_map`."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "code-map.md"
PACKAGES = ("headrace/common", "headrace/learner", "headrace/generation", "headrace/control", "headrace/launcher")
HEAD = """# The code, folder by folder

Each line is the first line of a module's docstring. This page is generated: `python -m tests.support.code_map` writes
it, and a test compares it. [architecture.md](architecture.md) says how the parts work together,
[changing.md](changing.md) which files a change touches.

Folders stand in the order of imports: a folder imports only those above it on this page and `headrace/common`
(`tests/repository/test_imports.py`).
"""


def summary(path: Path) -> str:
    """The first line of a module's docstring, as a sentence of one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def code_map(order: dict[str, str]) -> str:
    """The whole document. `order`: of each package the names of its folders, as the import test has them."""
    lines = [HEAD]
    for package in PACKAGES:
        root = ROOT / package
        lines += [f"## {package}", "", summary(root / "__init__.py"), ""]
        names = order[root.name].split()
        folders = [folder for name in names if (folder := root / name).is_dir()]
        for folder in [root, *(inner for outer in folders for inner in _with_inner(outer))]:
            files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
            if folder != root:
                lines += [f"### {folder.relative_to(ROOT)}", "", summary(folder / "__init__.py"), ""]
            if files:
                lines += ["| file | |", "|---|---|"]
                lines += [f"| [{path.name}](../{path.relative_to(ROOT)}) | {_cell(summary(path))} |" for path in files]
                lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _with_inner(folder: Path) -> list[Path]:
    return [folder, *sorted(path.parent for path in folder.glob("*/__init__.py"))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    from tests.repository.test_imports import FOLDERS

    DOCUMENT.write_text(code_map(FOLDERS))
