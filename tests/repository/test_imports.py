"""Who may import whom: services -> common -> libraries, and among sister folders only those that come earlier."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "headrace"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = {
    "common": "process wire hardware weights config redis http metrics environments tasks models preflight bootstrap",
    "learner": (
        "algorithm distributed model store steering intake training checkpoints weights scaling reporting stages "
        "commands demo_policy"
    ),
    "generation": "tensors engine gateway workers rewards environments tickets weights trial",
    "control": "models polling verdict view http",
    "demo": "",
    "launcher": "templates run estimates placement check terminal trial supervision report commands",
}
"""The folders of each part, from the lowest to the highest: each imports only those before it. The modules beside them
(`__main__`, `assembly`, `loop` and what these alone need) put the folders together; no folder imports them."""
PURE = [
    *(f"learner/algorithm/{name}.py" for name in ("staleness", "advantage", "loss", "trust_region", "token_layout")),
    "learner/model/logprobs.py",
    "learner/model/packing.py",
    "learner/training/batch_samples.py",
    "learner/training/step_metrics.py",
    "learner/intake/validation.py",
    *(f"generation/gateway/{name}.py" for name in ("messages", "conversation", "recorded_segment", "segments")),
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
PRIVATE_WORDS = {
    "telling",
    "books",
    "shown",
    "exported",
    "patience",
    "in_force",
    "happenings",
    "others",
    "turns",
    "together",
    "passing",
    "refusal",
    "route",
    "held_weights",
    "joining",
    "kept",
    "finding",
    "facts",
    "tally",
    "leading",
    "calls",
    "sight",
    "look",
    "shown_run",
}
"""Names that files of this project once had, where the field has a word of its own."""
ABOVE = {"__main__": {"loop", "assembly", "http_api"}, "assembly": {"loop"}, "http_api": {"loop"}, "results": {"loop"}}
"""Of the modules beside the folders, which may import which of `loop`, `assembly` and `__main__`."""


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """The modules that a file imports: of `from package import module` the module."""
    tree = parsed(path)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (module if is_module(module) else node.module for module in modules)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def is_module(dotted: str) -> bool:
    path = ROOT / dotted.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def in_part(part: str) -> list[Path]:
    return [path for path in SOURCES if part in path.relative_to(PACKAGE).parts[:1]]


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 200 and all((PACKAGE / pure).is_file() for pure in PURE)


@pytest.mark.parametrize("part", FOLDERS)
def test_every_folder_has_its_place_in_the_order(part: str) -> None:
    folders = {path.parent.name for path in (PACKAGE / part).glob("*/*.py")}
    assert folders - set(FOLDERS[part].split()) == set()
    for folder in folders:
        assert ast.get_docstring(ast.parse((PACKAGE / part / folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_services_import_common_and_never_each_other(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0]
    for module in imports(path):
        assert module.split(".")[0] not in ("tests", "benchmarks", "chaos"), f"{name_of(path)} imports {module}"
        if module.startswith("headrace."):
            assert module.split(".")[1] in (part, "common"), f"{name_of(path)} imports another service: {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_folder_imports_only_those_before_it(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if len(parts) < 2:
        return
    order = FOLDERS[parts[0]].split()
    for module in imports(path):
        _, part, *rest = [*module.split("."), ""]
        if not module.startswith("headrace.") or part != parts[0] or not rest[0]:
            continue
        if parts[1] in order:
            assert rest[0] in order, f"{name_of(path)} imports {module}, which puts the folders together"
            assert order.index(rest[0]) <= order.index(parts[1]), f"{name_of(path)} imports {module}, which is above"
        elif rest[0] in ("__main__", "assembly", "loop"):
            assert rest[0] in ABOVE.get(parts[1], set()), f"{name_of(path)} imports {module}"


def test_files_have_the_words_of_the_field() -> None:
    assert [name_of(path) for path in SOURCES if path.stem in PRIVATE_WORDS] == []


@pytest.mark.parametrize("path", in_part("common"), ids=name_of)
def test_common_imports_no_torch(path: Path) -> None:
    for module in imports(path, top_level_only=True):
        assert module.split(".")[0] not in ("torch", "transformers", "safetensors", "datasets"), name_of(path)


@pytest.mark.parametrize("path", PURE)
def test_pure_modules_do_no_io(path: str) -> None:
    for module in imports(PACKAGE / path):
        assert module.split(".")[0] not in IO_MODULES, f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_a_main_reads_the_configuration(path: Path) -> None:
    if path.stem == "__main__" or "config" in path.parts:
        return
    names = [node.id for node in ast.walk(parsed(path)) if isinstance(node, ast.Name)]
    assert "load_recipe" not in names, name_of(path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_pickled(path: Path) -> None:
    for module in imports(path):
        assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "shelve"), f"{name_of(path)}: {module}"
