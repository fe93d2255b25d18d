"""How long a sequence may be, by a model's configuration: what SGLang derives from the same one."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from common.context import UNKNOWN_LENGTH, context_tokens, fits

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 8192}


def config_of(kind: str, **settings: Any) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **settings).get_text_config()


def by_sglang(config: Any) -> int:
    """By its own function, without importing SGLang, which takes seconds and a torchvision."""
    origin = importlib.util.find_spec("sglang")
    assert origin is not None and origin.origin is not None
    tree = ast.parse((Path(origin.origin).parent / "srt/utils/hf_transformers/common.py").read_text())
    wanted = {"CONTEXT_LENGTH_KEYS", "get_context_length"}
    found: list[ast.stmt] = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name in wanted)
        or (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted)
    ]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(found, []), "sglang", "exec"), names)
    length: int = names["get_context_length"](config)
    return length


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of("qwen3", max_position_embeddings=40960), 40960),
        (
            config_of("qwen3", max_position_embeddings=32768, rope_parameters=YARN),
            32768,
        ),  # transformers adds the original length
        (config_of("qwen3", max_position_embeddings=131072, rope_parameters=YARN | ORIGINAL), 131072),
        (config_of("llama", max_position_embeddings=131072, rope_parameters=LLAMA3 | ORIGINAL), 131072),
        (config_of("gpt2", n_positions=1024), 1024),
        (config_of("gemma3"), 131072),
        (SimpleNamespace(), UNKNOWN_LENGTH),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_context_is_that_of_sglang(config: Any, expected: int) -> None:
    assert context_tokens(config) == expected == by_sglang(config)
    assert context_tokens(config, asked=512) == 512


def test_a_prompt_and_its_completion_must_fit_together() -> None:
    assert fits(500, 12, 512) and not fits(501, 12, 512)
