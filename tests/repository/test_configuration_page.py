"""docs/configuration.md is what the settings' definitions say."""

from pathlib import Path

from headrace.common.config.document import document

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_of_settings_is_generated() -> None:
    assert PAGE.read_text() == document(), (
        "out of date: python -m headrace.common.config.document > docs/configuration.md"
    )
