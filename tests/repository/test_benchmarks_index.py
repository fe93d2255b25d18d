"""benchmarks/README.md lists every command and every file of results, and each of them exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
INDEX = (BENCHMARKS / "README.md").read_text()


def commands() -> set[str]:
    """The modules that `python -m` runs."""
    runnable = [path for path in BENCHMARKS.rglob("*.py") if 'if __name__ == "__main__":' in path.read_text()]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in runnable if ".trl-venv" not in str(path)
    ]
    return {name.removesuffix(".__main__") for name in names}


def test_every_command_is_in_the_index() -> None:
    assert len(commands()) > 10
    assert set(re.findall(r"python -m (benchmarks[\w.]*)", INDEX)) == commands()


def test_every_file_of_results_is_in_the_index() -> None:
    results = {path.name for path in (BENCHMARKS / "results").glob("*.json")}
    assert results <= set(re.findall(r"[\w-]+\.json", INDEX))


def test_the_documents_that_cite_a_command_are_named() -> None:
    for row in (line for line in INDEX.splitlines() if line.startswith("| ") and "python -m" in line):
        command = re.findall(r"benchmarks(?:\.\w+)+|benchmarks/[\w/]+\.sh", row)[0]
        cited = re.findall(r"\]\(\.\./(docs/[\w-]+\.md)\)", row)
        assert cited, row
        for document in cited:
            assert command in (ROOT / document).read_text(), f"{document} does not cite {command}"
