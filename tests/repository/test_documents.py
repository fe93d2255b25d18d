"""The documents name what exists: links, files, commands, options, modules, make targets, settings, alerts, texts."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from headrace.common.config import load_recipe
from headrace.launcher.__main__ import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "deploy/**/*.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"
)
MAX_README_LINES = 150
SETTINGS = tuple(load_recipe(ROOT / "configs" / "tiny-cpu.yaml").sources)
SECTIONS = {name.split(".")[0] for name in SETTINGS if "." in name}
FOLDERS = "headrace|tests|benchmarks|chaos|configs|deploy|docs"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(#[^)]*)?\)", page.read_text()):
        to = page.parent / target if target else page
        assert to.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor[1:] in anchors(to), f"{page.name}: {target}{anchor}"


@pages
def test_files_exist(page: Path) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*\w)(?:::\w+)?/?`", page.read_text()):
        assert (ROOT / path).exists() or path == "benchmarks/results", f"{page.name}: {path}"


@pages
def test_commands_and_options_exist(page: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"(?:^|[`(\n] *\$? ?)headrace ([a-z][^`\n#]*)", page.read_text()):
        name, *words = line.split()
        assert name.rstrip(",.;:") in commands, f"{page.name}: headrace {name}"
        options = {option for parameter in commands[name.rstrip(",.;:")].params for option in parameter.opts}
        ignores = commands[name.rstrip(",.;:")].context_settings.get("ignore_unknown_options")
        for word in words:
            if word in ("&&", "|", ";"):
                break
            if word.startswith("--") and not ignores:
                assert word.split("=")[0].strip("…].,") in options | {"--help"}, f"{page.name}: headrace {line}"


@pages
def test_modules_exist(page: Path) -> None:
    for module in re.findall(r"python3?(?:\.11)? -m ((?:headrace|benchmarks|chaos|tests)[\w.]*\w)", page.read_text()):
        assert importlib.util.find_spec(module), f"{page.name}: python -m {module}"


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(), re.M)) <= targets, page.name


@pages
def test_settings_exist(page: Path) -> None:
    for name in re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]*[a-z_])\b", page.read_text()):
        is_known = any(f"{name}.".startswith(f"{one}.") or one.startswith(f"{name}.") for one in SETTINGS)
        assert is_known, f"{page.name}: {name}"


NAMED = re.findall(r"`([\w/.]+\.\w+)` \(((?:`\w+`,? ?)+)", (ROOT / "docs" / "changing.md").read_text())
"""In docs/changing.md, each file and the names in parentheses behind it."""


@pytest.mark.parametrize(("path", "names"), NAMED)
def test_recipes_name_what_the_file_defines(path: str, names: str) -> None:
    code = (ROOT / path).read_text()
    for name in re.findall(r"`(\w+)`", names):
        defined = rf"\b(?:class|def|function|const) {name}\b|^ *{name}\b(?:: .*)? =|^ *{name}: |\b{name}, .* = "
        assert re.search(defined, code, re.M), f"{path}: {name}"


def test_there_are_recipes_to_check() -> None:
    assert len(NAMED) > 25


@cache
def words_of_the_code() -> set[str]:
    """And of Compose's file and the tests, which the documents name too."""
    patterns = ("headrace/**/*.py", "headrace/**/*.js", "tests/**/*.py", "docker-compose.yml")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return {word for path in files for word in re.findall(r"\w+", path.read_text())}


@pages
def test_names_occur_in_the_code(page: Path) -> None:
    for name in re.findall(r"`([a-z]{2,}\w*_\w+)`", page.read_text()):
        assert {name, name.removeprefix("headrace_")} & words_of_the_code(), f"{page.name}: {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and page.name not in index
    ] == []


def test_every_alert_is_explained() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    text = (ROOT / "docs" / "running.md").read_text()
    explained = re.findall(r"^\| `(Headrace\w+)` \| (.{20,}) \| (.{20,}) \|$", text, re.M)
    assert [name for name, _, _ in explained] == alerts


@cache
def texts_of_the_code() -> str:
    """Every text in the package's code, with … for what is put into it."""
    found = []
    for path in (ROOT / "headrace").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w*\}|%(?:\.\d)?[sdgf]", "…", node.value))
    return "\n".join(found)


QUOTED = re.findall(r'^\| "(.+?)" \|', (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)


@pytest.mark.parametrize("text", QUOTED)
def test_error_texts_are_quoted_as_the_code_has_them(text: str) -> None:
    assert text in texts_of_the_code()


def test_there_are_texts_to_check() -> None:
    assert len(QUOTED) > 30
