"""How long a sequence may be, by a model's configuration: what SGLang derives from the same one."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from headrace.common.models.context_length import DEFAULT_LENGTH, context_tokens, fits_context
from tests.support.sglang_source import names_of

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 8192}


def config_of(kind: str, **settings: Any) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **settings).get_text_config()


def by_sglang(config: Any) -> int:
    names = names_of("srt/utils/hf_transformers/common.py", "CONTEXT_LENGTH_KEYS", "get_context_length")
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
        (SimpleNamespace(), DEFAULT_LENGTH),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_context_is_that_of_sglang(config: Any, expected: int) -> None:
    assert context_tokens(config) == expected == by_sglang(config)
    assert context_tokens(config, asked=512) == 512


def test_a_prompt_and_its_completion_must_fit_together() -> None:
    assert fits_context(500, 12, 512) and not fits_context(501, 12, 512)
