"""Who may import whom: services.X -> common -> libraries, and inside a service __main__ -> loop -> siblings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "common").rglob("*.py"), *(ROOT / "services").rglob("*.py")])
PURE = [
    f"services/learner/{name}.py"
    for name in ("staleness", "advantage", "loss", "logprobs", "packing", "metrics", "refusal")
]
IO_MODULES = {
    "redis",
    "httpx",
    "aiohttp",
    "fastapi",
    "uvicorn",
    "os",
    "socket",
    "subprocess",
    "asyncio",
    "threading",
    "pathlib",
}
TOP = {"loop", "__main__", "assembly"}
"""Modules that put the others together: siblings never import them."""


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 40 and all((ROOT / pure).is_file() for pure in PURE)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_services_import_common_and_never_each_other(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    for module in imports(path):
        if not module.startswith("services."):
            assert not module.startswith("tests"), f"{name_of(path)} imports {module}"
            continue
        assert parts[0] == "services", f"{name_of(path)} imports the service module {module}"
        assert module.split(".")[1] == parts[1], f"{name_of(path)} imports another service: {module}"


@pytest.mark.parametrize("path", [p for p in SOURCES if "services" in p.parts], ids=name_of)
def test_siblings_never_import_what_puts_them_together(path: Path) -> None:
    allowed = {"__main__": {"loop", "assembly", "api"}, "assembly": {"loop"}, "api": {"loop"}}
    for module in imports(path):
        last = module.split(".")[-1]
        if module.startswith("services.") and last in TOP:
            assert last in allowed.get(path.stem, set()), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", [p for p in SOURCES if "common" in p.parts], ids=name_of)
def test_common_imports_no_torch(path: Path) -> None:
    for module in imports(path, top_level_only=True):
        assert module.split(".")[0] not in ("torch", "transformers", "safetensors", "datasets"), name_of(path)


@pytest.mark.parametrize("path", PURE)
def test_pure_modules_do_no_io(path: str) -> None:
    for module in imports(ROOT / path):
        assert module.split(".")[0] not in IO_MODULES, f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_a_main_reads_the_configuration(path: Path) -> None:
    if path.stem == "__main__" or "config" in path.parts:
        return
    names = [node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
    assert "load_recipe" not in names, name_of(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_pickled(path: Path) -> None:
    for module in imports(path):
        assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "shelve"), f"{name_of(path)}: {module}"
