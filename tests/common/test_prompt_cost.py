"""Whether prompts are shared, and what it costs if not: as the learner then finds."""

import pytest

from headrace.common.models.prompt_cost import non_attention_layers, unshared_prompt_note
from headrace.learner.model.self_check import can_share_prompts
from tests.support.tiny_models import make_model

BEYOND = {
    "qwen3": [],
    "qwen3_moe": [],
    "bloom": [],
    "qwen3_next": ["linear_attention"],
    "qwen3_5_text": ["linear_attention"],
    "lfm2": ["conv"],
    "mamba": ["linear_attention"],
    "jamba": ["linear_attention"],
}


@pytest.mark.parametrize("kind", BEYOND)
def test_layers_that_are_no_attention_are_found_in_the_configuration(kind: str) -> None:
    settings = {"attn_layer_period": 2, "attn_layer_offset": 1} if kind == "jamba" else {}
    model = make_model(kind, **settings)
    assert non_attention_layers(model.config) == BEYOND[kind]
    assert can_share_prompts(model, kind) or BEYOND[kind] or kind == "bloom"  # whose attention is its own


def test_the_cost_by_hand() -> None:
    told = unshared_prompt_note(make_model("qwen3_next").config, group_size=8, prompt_tokens=512, groups_per_step=4)
    assert "8 times" in told and "linear_attention" in told and f"{7 * 512 * 4:,} tokens" in told
    assert not unshared_prompt_note(make_model("qwen3").config, group_size=8, prompt_tokens=512, groups_per_step=4)
