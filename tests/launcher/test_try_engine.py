"""`headrace try --url` with the real SGLang, at its own OpenAI-compatible endpoint."""

from pathlib import Path

import pytest

from headrace.common.config import load_recipe
from tests.launcher.test_try import tried

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demos_task_is_tried_at_an_endpoint(engine_url: str) -> None:
    _, text = tried(load_recipe(ROOT / "configs" / "tiny-cpu.yaml").config, engine_url, num=2)
    assert text.count("\n   reward ") == 2 and "\n2 completions: reward " in text
