"""Shared prompts: values and gradients are those of each completion computed alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headrace.common.config import LearnerConfig, ModelConfig
from headrace.learner.model.policy import Policy
from headrace.learner.model.self_check import can_share_prompts
from headrace.learner.model.shared_prefix import Layout, layout_tensors

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "olmo2": {},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
}
layouts = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=4
).map(lambda groups: Layout([prompt for prompt, _ in groups], [lengths for _, lengths in groups]))


def make_model(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | MODELS.get(kind, {}) | settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights with the model's own attention, and with ours."""
    alone, shared = make_model(request.param), make_model(request.param)
    assert can_share_prompts(shared, request.param)
    return alone, shared


def hidden_alone(model: PreTrainedModel, layout: Layout, tokens: Tensor) -> Tensor:
    """Hidden states of the prompt's last token and of each completion, each completion computed separately."""
    found = []
    for prompt, completion in layout.spans:
        row = tokens[[*prompt, *completion]][None]
        found.append(model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
    return torch.cat(found)


def hidden_shared(model: PreTrainedModel, layout: Layout, tokens: Tensor) -> Tensor:
    """The same, with each prompt computed once."""
    where = layout_tensors(layout, torch.device("cpu"))
    decoder = model.get_decoder()
    hidden = decoder(input_ids=tokens[None], position_ids=where.positions, use_cache=False, layout=where)
    index = [place for prompt, completion in layout.spans for place in (prompt[-1], *completion)]
    picked: Tensor = hidden.last_hidden_state[0][index]
    return picked


def gradients(model: PreTrainedModel, hidden: Tensor) -> Sequence[Tensor]:
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@settings(max_examples=15)
@given(layouts, st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_each_completion_alone(
    models: tuple[PreTrainedModel, PreTrainedModel], layout: Layout, seed: int
) -> None:
    alone, shared = models
    tokens = torch.randint(VOCABULARY, (layout.num_tokens,), generator=torch.Generator().manual_seed(seed))
    expected, found = hidden_alone(alone, layout, tokens), hidden_shared(shared, layout, tokens)
    assert torch.allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(gradients(shared, found), gradients(alone, expected), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6


def test_a_completion_attends_to_no_other(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    layout = Layout([4], [[5, 5]])
    tokens = torch.arange(layout.num_tokens)
    before = hidden_shared(models[1], layout, tokens)
    tokens[4:9] = 50
    after = hidden_shared(models[1], layout, tokens)
    # Not bit for bit: an expert multiplies all of its tokens at once, and how many those are has changed.
    assert torch.allclose(before[6:], after[6:], atol=1e-6) and not torch.allclose(before[1:6], after[1:6])


def test_layout_tensors_by_hand() -> None:
    layout = Layout([3, 1], [[2, 4], [0]])
    where = layout_tensors(layout, torch.device("cpu"))
    assert where.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6, 0]]
    assert where.rows.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 5, 6, 7, 8], [9, 2, 3, 4, 5, 6, 7]]
    assert where.back.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


@given(layouts)
def test_padding_uses_every_token_about_equally_often(layout: Layout) -> None:
    """CUDA's backward pass adds the gradients of a repeated index one after another."""
    _, rows, back = layout.indices
    is_real = np.zeros(rows.shape, bool)
    for row, (prompt, completion) in enumerate(layout.spans):
        is_real[row, : len(prompt) + len(completion)] = True
    padding = np.bincount(rows[~is_real], minlength=layout.num_tokens)
    assert padding.max() - padding.min() <= 1
    assert is_real.reshape(-1)[back].all()


def test_the_choice_of_padding_tokens_changes_neither_values_nor_gradients(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    """The results are bit-identical to those with all padding on token 0."""
    layout, model = Layout([6, 2], [[2, 9, 1], [3]]), models[1]
    tokens = torch.arange(layout.num_tokens)
    spread = layout.indices
    on_token_0 = spread[1].copy()
    for row, (prompt, completion) in enumerate(layout.spans):
        on_token_0[row, len(prompt) + len(completion) :] = 0
    assert not np.array_equal(on_token_0, spread[1])
    found = hidden_shared(model, layout, tokens)
    ours = gradients(model, found)
    layout.__dict__["indices"] = spread[0], on_token_0, spread[2]
    expected = hidden_shared(model, layout, tokens)
    assert torch.equal(found, expected)
    for one, other in zip(ours, gradients(model, expected), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)


def test_the_saved_policy_names_the_models_own_attention(demo_policy: Path, tmp_path: Path) -> None:
    policy = Policy(ModelConfig(path=str(demo_policy), dtype="float32"), LearnerConfig(device="cpu"))
    policy.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "headrace" not in (tmp_path / "config.json").read_text()
    assert model(input_ids=torch.arange(5)[None]).logits.shape == (1, 5, model.config.vocab_size)
    assert np.isfinite(model(input_ids=torch.arange(5)[None]).logits.detach().numpy()).all()
