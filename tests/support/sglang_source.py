"""Functions and constants of the installed SGLang, without importing it, which takes seconds and a torchvision."""

import ast
import importlib.util
from pathlib import Path
from typing import Any


def names_of(file: str, *wanted: str, **given: Any) -> dict[str, Any]:
    """`wanted` of a source file of SGLang's; `given`: what they need besides each other."""
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.origin is not None
    tree = ast.parse((Path(package.origin).parent / file).read_text())
    found: list[ast.stmt] = [node for node in tree.body if _name(node) in wanted]
    assert sorted(map(_name, found)) == sorted(wanted), f"{file} has not all of {wanted}"
    names = dict(given)
    exec(compile(ast.Module(found, []), file, "exec"), names)
    return names


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return ""
