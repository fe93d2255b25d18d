"""docs/code-map.md is what the docstrings say."""

from tests.repository.test_imports import FOLDERS
from tests.support.code_map import DOCUMENT, code_map


def test_the_code_map_is_generated() -> None:
    assert DOCUMENT.read_text() == code_map(FOLDERS), "out of date: python -m tests.support.code_map"
