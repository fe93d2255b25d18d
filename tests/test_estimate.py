"""Estimates against what they are of: models of transformers, what autograd keeps, the optimizer, encoded groups."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.config import OptimizerConfig, RunConfig
from common.wire import Group, Rollout, Sampling, Ticket, Timings, VersionSpan, encode
from services.launcher.check import readable
from services.launcher.estimate import (
    Shape,
    activation_bytes,
    engine_bytes,
    full_length_group,
    kv_bytes_per_token,
    learner_bytes,
    logprob_bytes,
    moved_bytes,
    read_shape,
)
from services.learner.optimizer import MasterAdamW

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 200,
    "vocab_size": 321,
}
QWEN_1_5B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
"""Of Qwen2.5-1.5B-Instruct, which has 1,543,714,304 parameters."""


def config_of(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "task": {"name": "arithmetic"}, **sections})


def make_model(given: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = AutoConfig.for_model(given["model_type"], **{k: v for k, v in given.items() if k != "model_type"})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def shape_of(model: PreTrainedModel) -> Shape:
    return read_shape(json.loads(model.config.to_json_string(use_diff=True)))


@pytest.mark.parametrize(
    "given",
    [
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen2", "tie_word_embeddings": False},
        {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 24},
        {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 24, "attention_bias": True},
        {"model_type": "llama", "tie_word_embeddings": False},
        {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 24, "attention_bias": True, "mlp_bias": True},
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_parameters_are_those_of_the_model(given: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = make_model(SIZES | given)
    assert read_shape(SIZES | given).num_parameters == model.num_parameters()
    assert shape_of(model).num_parameters == model.num_parameters(), "as transformers writes its config.json"


def test_parameters_are_those_of_the_demo_policy(demo_policy: Path) -> None:
    with safe_open(demo_policy / "model.safetensors", "np") as file:
        count = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    shape = read_shape(json.loads((demo_policy / "config.json").read_text()))
    assert shape.num_parameters == count
    version = next(iter(moved_bytes(shape, config_of(model={"path": "m", "dtype": "float32"})).values()))
    assert version == pytest.approx((demo_policy / "model.safetensors").stat().st_size, rel=0.005)


def test_parameters_of_a_published_model() -> None:
    assert read_shape(QWEN_1_5B).num_parameters == 1_543_714_304


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_what_cannot_be_counted_is_said(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_shape(QWEN_1_5B | change)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_activations_are_about_what_autograd_keeps(kind: str, dtype: torch.dtype, is_checkpointed: bool) -> None:
    """Rows as many as in practice against the norms' few; one layer's working set comes with the backward pass."""
    sizes = SIZES | {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 352, "num_hidden_layers": 8}
    model = make_model(sizes | {"model_type": kind, "head_dim": 32, "tie_word_embeddings": True}, dtype)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    rows, width = 2, 64
    kept = _kept_bytes(model, torch.randint(0, sizes["vocab_size"], (rows, width)))
    shape, size = shape_of(model), dtype.itemsize
    expected = activation_bytes(shape, rows * width, size, is_checkpointed=is_checkpointed)
    if is_checkpointed:
        one_layer = activation_bytes(shape, rows * width, size, is_checkpointed=False) // shape.layers
        final_norm = rows * width * shape.hidden * (4 + size)
        assert kept == pytest.approx(expected - one_layer + final_norm, rel=0.05)
    else:
        assert kept == pytest.approx(expected, rel=0.05)


def _kept_bytes(model: PreTrainedModel, input_ids: torch.Tensor) -> int:
    """Of the tensors, without the parameters, that autograd keeps of a forward pass."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizers_share_is_what_it_holds(dtype: str) -> None:
    model = make_model(SIZES | {"model_type": "qwen2", "tie_word_embeddings": True}, getattr(torch, dtype))
    optimizer = MasterAdamW(model, OptimizerConfig.model_validate({}))
    model(input_ids=torch.arange(6)[None]).logits.float().sum().backward()
    gradients = [master.grad for master in optimizer.masters.values()]
    held = {
        f"weights, {dtype}": sum(p.nbytes for p in model.parameters()),
        "gradients, float32": sum(g.nbytes for g in gradients if g is not None),
    }
    optimizer.update(1e-3)
    tensors = optimizer.state_tensors()
    held["AdamW's moments, float32"] = sum(t.nbytes for name, t in tensors.items() if name.startswith("exp_avg"))
    if dtype == "bfloat16":
        held["masters, float32"] = sum(t.nbytes for name, t in tensors.items() if name.startswith("master."))
    rows = learner_bytes(shape_of(model), config_of(model={"path": "m", "dtype": dtype}))
    assert {what: num_bytes for what, num_bytes in rows.items() if what in held} == held
    assert len(rows) == len(held) + 2, "and activations, and log-probabilities"


def test_a_reference_policy_is_counted_where_there_is_one() -> None:
    shape = read_shape(QWEN_1_5B)
    without, with_kl = (learner_bytes(shape, config_of(actor={"kl_coef": kl})) for kl in (0.0, 0.1))
    assert sum(with_kl.values()) - sum(without.values()) == 2 * shape.num_parameters


def test_log_probabilities_take_a_chunk_and_the_heads_gradient() -> None:
    shape = read_shape(QWEN_1_5B)
    head = 151936 * 1536
    assert logprob_bytes(shape, 2048, 2, is_cuda=False) == 2048 * 151936 * 4 + head * 6
    assert logprob_bytes(shape, 2048, 2, is_cuda=True) == 2048 * 151936 * 6 + head * 8
    assert logprob_bytes(shape, 2048, 4, is_cuda=True) == 2048 * 151936 * 4 + head * 4


def test_the_key_value_cache_of_a_published_model() -> None:
    shape = read_shape(QWEN_1_5B)
    assert kv_bytes_per_token(shape, 2) == 28_672
    *_, given = engine_bytes(shape, config_of(), 1000).values()
    *_, demanded = engine_bytes(shape, config_of(), None).values()
    assert (given, demanded) == (1000 * 28_672, 256 * (1024 + 256) * 28_672)


def test_bytes_of_a_step_are_those_of_encoded_groups() -> None:
    shape, replicas = read_shape(QWEN_1_5B), 3
    config = config_of(learner={"groups_per_step": 5}, generation={"replicas": replicas})
    version, step = moved_bytes(shape, config).values()
    assert version == 2 * shape.num_parameters * replicas
    group = _random_group(config, shape.vocab)
    assert step == pytest.approx(5 * (len(encode(group)) + len(encode(group.ticket))), rel=0.02)
    shortest = encode(full_length_group(config_of(sampling={"max_new_tokens": 1}), shape.vocab))
    assert len(shortest) < len(encode(group)) / 20, "completions are most of it"


def _random_group(config: RunConfig, vocab: int) -> Group:
    rng = np.random.default_rng(0)
    length, text = config.sampling.max_new_tokens, "four" * config.sampling.max_new_tokens
    rollouts = [
        Rollout(
            tokens=rng.integers(0, vocab, length, dtype=np.int32),
            loss_mask=b"\1" * length,
            behaviour_logprobs=-rng.random(length).astype(np.float32),
            version_spans=[VersionSpan(41, 0, 100), VersionSpan(42, 100, length)],
            reward=float(index % 2),
            finish_reason="length",
            text=text,
        )
        for index in range(config.actor.group_size)
    ]
    ticket = Ticket(
        id="3-1234",
        kind="train",
        prompt_tokens=rng.integers(0, vocab, 256).tolist(),
        messages=[{"role": "user", "content": "four" * 256}],
        reference={"answer": "42"},
        num_completions=len(rollouts),
        sampling=Sampling(1.0, length, [151643, 151645]),
        min_weight_version=41,
    )
    return Group(ticket, rollouts, "generation-2", Timings(1.7e9, 1.7e9, 1.7e9))


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_bytes_are_readable(num_bytes: int, text: str) -> None:
    assert readable(num_bytes) == text
