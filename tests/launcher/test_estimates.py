"""Estimates against what they are of: models of transformers, what autograd keeps, the optimizer, encoded groups."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headrace.common.config import OptimizerConfig, Recipe, RunConfig
from headrace.common.hardware import device as device_module
from headrace.common.hardware.gpus import Gpu
from headrace.common.preflight.recipe import UnavailableHere
from headrace.common.weights.delta import bits_of, make_patch
from headrace.common.wire import Group, Rollout, Sampling, Ticket, Timings, VersionSpan, encode
from headrace.launcher.check import estimate_inputs, sections
from headrace.launcher.check.estimate_inputs import EstimateInputs
from headrace.launcher.check.prompt_trial import TaskTrial
from headrace.launcher.check.sections import format_bytes
from headrace.launcher.estimates.device_memory import (
    activation_bytes,
    engine_bytes,
    kv_bytes_per_token,
    learner_bytes,
    logprob_bytes,
    static_fraction,
)
from headrace.launcher.estimates.duration import (
    Speed,
    cpu_speed,
    duration_warnings,
    estimate,
    format_seconds,
    measure_flops,
)
from headrace.launcher.estimates.host_memory import (
    ENVIRONMENT_WORKER_BYTES,
    EPISODES_BYTES,
    REWARD_WORKER_BYTES,
    STATE_BYTES,
    TOKEN_BYTES,
    disk_rows,
    host_rows,
    shared_memory_problem,
)
from headrace.launcher.estimates.model_size import Shape, read_shape, shape_in
from headrace.launcher.estimates.model_size import shape_of as shape_of_run
from headrace.launcher.estimates.traffic import delta_share, full_length_group, traffic_bytes
from headrace.launcher.up import up
from headrace.learner.distributed.state_files import write_state
from headrace.learner.training.optimizer import MasterAdamW

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
QWEN_7B = QWEN_1_5B | {
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for bfloat16, whatever machine this is."""
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: True)


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
    _, whole, _ = traffic_bytes(shape, config_of(model={"path": "m", "dtype": "float32"})).values()
    assert whole == pytest.approx((demo_policy / "model.safetensors").stat().st_size, rel=0.005)


@pytest.mark.parametrize(
    "given",
    [
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
        {"model_type": "gemma3_text", "head_dim": 24, "tie_word_embeddings": True},
    ],
    ids=lambda given: given["model_type"],
)
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_parameters_are_read_from_the_files_of_any_architecture(
    given: dict[str, Any], shard_size: str, tmp_path: Path
) -> None:
    model = make_model(SIZES | given)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    shape = shape_in(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert shape.num_parameters == model.num_parameters()
    root = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    assert shape.num_root_parameters == root
    rows = learner_bytes(shape, config_of(model={"path": "m", "dtype": "float32"}))
    assert rows["weights, float32"] == 4 * model.num_parameters()
    if given["model_type"] == "qwen3_moe":
        unused = 3 * (4 - 2) * 3 * 40 * 96 + 3 * 4 * 96  # experts that a token does not go through, and the routers
        embedding = 321 * 96
        assert shape.num_active_parameters == pytest.approx(model.num_parameters() - unused - embedding, rel=1e-3)


def test_files_that_are_not_all_here_or_broken_are_no_count(tmp_path: Path) -> None:
    make_model(SIZES | {"model_type": "llama"}).save_pretrained(tmp_path, max_shard_size="100KB")
    config = json.loads((tmp_path / "config.json").read_text())
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    second.unlink()
    assert shape_in(tmp_path, config).counted is None
    second.write_bytes(b"\xff" * 16)
    with pytest.raises(ValueError, match=second.name):
        shape_in(tmp_path, config)
    assert first.exists()


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


def test_a_cpu_without_units_for_bfloat16_has_weights_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = read_shape(QWEN_1_5B)
    on_cpu, on_cuda = (config_of(learner={"device": device}) for device in ("cpu", "cuda"))
    with_units = learner_bytes(shape, on_cpu)
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: False)
    without = learner_bytes(shape, on_cpu)
    assert with_units["weights, bfloat16"] == 2 * shape.num_parameters
    assert without["weights, bfloat16 in float32"] == 4 * shape.num_parameters
    assert without["masters, float32"] == 4 * shape.num_parameters
    assert learner_bytes(shape, on_cuda)["weights, bfloat16"] == 2 * shape.num_parameters


def test_on_several_ranks_each_has_its_part() -> None:
    shape = read_shape(QWEN_1_5B)
    on = {ranks: learner_bytes(shape, config_of(learner={"num_ranks": ranks})) for ranks in (1, 8)}
    parts = [num_bytes for what, num_bytes in on[8].items() if what.endswith("its part")]
    assert sum(parts) == pytest.approx(16 * shape.num_parameters / 8, rel=1e-6), "masters, moments, gradients"
    (gathered,) = [num_bytes for what, num_bytes in on[8].items() if what.startswith("gathered")]
    assert gathered == 2 * (shape.num_root_parameters + 2 * shape.num_layer_parameters)
    assert shape.num_root_parameters + 28 * shape.num_layer_parameters == shape.num_parameters
    assert not [what for what in on[8] if what.startswith("weights")], "no copy of all weights"
    assert sum(on[8].values()) < sum(on[1].values()) / 2


@pytest.mark.parametrize(
    ("mib", "expected"), [(81_559, 0.83), (143_771, 0.90), (24_564, 0.69)], ids=["H100", "H200", "4090"]
)
def test_an_engine_takes_of_a_gpu_what_sglang_takes(mib: int, expected: float) -> None:
    config, gpu_bytes = config_of(), mib << 20
    assert static_fraction(gpu_bytes, config) == pytest.approx(expected, abs=0.01)
    weights, cache, rest = engine_bytes(read_shape(QWEN_1_5B), config, None, gpu_bytes).values()
    assert weights + cache == pytest.approx(expected * gpu_bytes, rel=0.02)
    assert weights + cache + rest == pytest.approx(gpu_bytes, rel=1e-6)
    given = config_of(generation={"engine": {"memory_fraction": 0.5}})
    weights, cache, _ = engine_bytes(read_shape(QWEN_1_5B), given, None, gpu_bytes).values()
    assert weights + cache == gpu_bytes // 2


def test_what_a_gpu_has_not_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner of 7B, which is no H100's on one rank, beside an engine that takes what SGLang takes."""
    monkeypatch.setattr(estimate_inputs, "visible_gpus", lambda: [Gpu("0", 80 << 30), Gpu("1", 80 << 30)])
    on_gpu = {"learner": {"device": "cuda"}, "generation": {"engine": {"device": "cuda"}}}
    inputs = EstimateInputs(config_of(**on_gpu), TaskTrial(), read_shape(QWEN_7B), [])
    engine = sections.engine(inputs)
    assert sections.learner(inputs) is not None and engine is not None
    (note,) = inputs.notes
    assert "the learner needs about 13" in note and "the GPU has 80.0 GiB; expected more learner.num_ranks" in note
    assert sum(engine.value.values()) == pytest.approx(80 << 30, rel=1e-6)
    ranks = {"learner": {"device": "cuda", "num_ranks": 8}}
    inputs = EstimateInputs(config_of(**ranks), TaskTrial(), read_shape(QWEN_7B), [])
    assert sections.learner(inputs) and inputs.notes == []


@pytest.mark.parametrize(
    ("dtype", "lr", "measured"),
    [
        ("float32", 1e-5, 0.425),
        ("float32", 1e-6, 0.32),
        ("bfloat16", 1e-5, 0.0167),
        ("bfloat16", 1e-6, 0.0047),
    ],
)
def test_a_delta_is_about_what_a_real_model_sent(dtype: str, lr: float, measured: float) -> None:
    """SmolLM2-135M-Instruct with four updates a step: bytes over the model's."""
    config = config_of(model={"path": "m", "dtype": dtype}, optimizer={"lr": lr})
    assert measured / 1.4 < delta_share(config) < measured * 1.4


@pytest.mark.parametrize(("dtype", "lr"), [("float32", 1e-5), ("bfloat16", 1e-6), ("bfloat16", 1e-4)])
def test_a_delta_is_what_the_code_makes_of_such_changes(dtype: str, lr: float) -> None:
    config = config_of(model={"path": "m", "dtype": dtype}, optimizer={"lr": lr})
    moved = lr * config.actor.num_mini_batches * 0.05
    before = torch.randn(1 << 20) * 0.04
    after = before + moved * torch.randn(1 << 20)
    size = 4 if dtype == "float32" else 2
    bits = [bits_of(one.to(getattr(torch, dtype)).view(torch.uint8).numpy(), size) for one in (after, before)]
    patch, _ = make_patch(*bits)
    assert patch.num_bytes / (size << 20) == pytest.approx(delta_share(config), rel=0.5)


def test_disk_is_counted_by_what_a_checkpoint_is(tmp_path: Path) -> None:
    """A state that the code has written, of a small model."""
    model = make_model(SIZES | {"model_type": "qwen2", "tie_word_embeddings": True}, torch.bfloat16)
    optimizer = MasterAdamW(model, OptimizerConfig.model_validate({}))
    model(input_ids=torch.arange(6)[None]).logits.float().sum().backward()
    optimizer.update(1e-3)
    write_state(tmp_path, optimizer.state_tensors())
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    shape = shape_of(model)
    assert written == pytest.approx(STATE_BYTES * shape.num_parameters, rel=0.05)
    checkpoints, _, _ = disk_rows(shape, config_of(), 0.01).values()
    assert checkpoints == 3 * STATE_BYTES * shape.num_parameters


def test_the_learners_host_memory_is_of_all_ranks_only_where_they_compute_there() -> None:
    shape, config = read_shape(QWEN_1_5B), config_of(learner={"num_ranks": 2})
    on_gpu, on_cpu = (host_rows(shape, config, 1 << 30, 1 << 20, (it, it)) for it in (False, True))
    (learner_on_gpu, *_), (learner_on_cpu, *_) = on_gpu[0].values(), on_cpu[0].values()
    assert learner_on_cpu - learner_on_gpu == 2 << 30
    assert sum(on_cpu[1].values()) - sum(on_gpu[1].values()) == 1 << 20
    url = {"engine": {"url": "http://127.0.0.1:30000"}}
    assert len(host_rows(shape, config_of(generation=url), 0, 0, (True, True))[1]) == 2, "the engine is elsewhere"


def test_a_replica_that_plays_episodes_has_environment_workers_in_place_of_reward_workers() -> None:
    shape, config = read_shape(QWEN_1_5B), config_of(environment={"workers": 3}, generation={"reward_workers": 2})
    (own, rewards, *_), (with_gateway, workers, *_) = (
        host_rows(shape, config, 0, 0, (True, True), has_rollout)[1].values() for has_rollout in (False, True)
    )
    assert rewards == 2 * REWARD_WORKER_BYTES and workers == 3 * ENVIRONMENT_WORKER_BYTES
    assert with_gateway == own + EPISODES_BYTES + shape.vocab * TOKEN_BYTES, "it has a tokenizer"


def test_weights_that_do_not_fit_into_shared_memory_are_refused_before_anything_starts(
    demo_policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine whose /dev/shm has 6 MiB: two versions of the demo's 2.5 MiB for one replica, and not the three that
    several share with the learner."""
    usage = shutil.disk_usage(tmp_path)._replace(free=6 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    given = {"path": str(demo_policy), "dtype": "float32"}
    one, two = (config_of(model=given, generation={"replicas": count}) for count in (1, 2))
    shape = shape_of_run(one)
    assert shared_memory_problem(shape, one) == ""
    assert "/dev/shm has 0.0 GiB free" in shared_memory_problem(shape, two)
    with pytest.raises(UnavailableHere, match="3 versions of the weights take"):
        up(Recipe(two, {}), "run", tmp_path / "runs", Console())
    assert not (tmp_path / "runs").exists()


def test_times_follow_from_the_multiplications() -> None:
    shape = read_shape(QWEN_1_5B)
    config = config_of(
        sampling={"max_new_tokens": 200},
        actor={"group_size": 4, "num_mini_batches": 1},
        learner={"groups_per_step": 8, "gradient_checkpointing": False},
        evaluation={"num_prompts": 10, "completions_per_prompt": 1},
    )
    times = estimate(shape, config, 50, Speed(1e12, 1e11), Speed(2e12, 2e11), start=10.0)
    forward = 2 * (shape.num_parameters)  # the head is as large as the embedding, which is not multiplied
    assert times.training == pytest.approx((8 * 4 * 100 + 8 * 50) * forward * 3 / 1e12, rel=0.01)
    assert times.generation == pytest.approx(8 * 4 * 100 * forward / 2e11, rel=0.01)
    assert times.evaluation == pytest.approx(10 * 100 * forward / 2e11, rel=0.01)
    assert times.step == times.generation
    assert times.first_step == pytest.approx(10 + times.evaluation + times.generation + times.training)
    assert duration_warnings(times, config) == []
    slow = estimate(shape, config, 50, Speed(1e10, 1e9), Speed(1e10, 1e9), start=10.0)
    evaluation, step = duration_warnings(slow, config)
    assert "10 prompts x 1 completions takes about 51 min here" in evaluation and "evaluation.num_prompts" in evaluation
    assert "which is generating 8 groups x 4 completions" in step and "learner.groups_per_step" in step


def test_a_cpus_speed_is_of_its_threads_and_units() -> None:
    threads = {"learner": {"num_threads": 2}, "generation": {"replicas": 2}}
    learner, engine = cpu_speed(config_of(**threads), 4e10, has_units=False, num_cores=8)
    assert learner.training == 4e10
    assert engine.training == pytest.approx(4e10 / 5), "bfloat16 without units"
    learner, engine = cpu_speed(config_of(**threads), 4e10, has_units=True, num_cores=1)
    assert (learner.training, engine.training) == (2e10, 2e10), "no more threads than cores"
    assert 1e8 < measure_flops() < 1e14


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.2 s"), (99.4, "99 s"), (301, "5 min"), (7200, "2.0 h")])
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


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
    shape = read_shape(QWEN_1_5B)
    config = config_of(learner={"groups_per_step": 5}, generation={"replicas": 3})
    version, whole, step = traffic_bytes(shape, config).values()
    assert whole == 2 * shape.num_parameters
    assert version == int(whole * delta_share(config))
    group = _random_group(config, shape.vocab)
    assert step == pytest.approx(5 * (len(encode(group)) + len(encode(group.ticket))), rel=0.02)
    shortest = encode(full_length_group(config_of(sampling={"max_new_tokens": 1}), shape.vocab))
    assert len(shortest) < len(encode(group)) / 20, "completions are most of it"


def _random_group(config: RunConfig, vocab: int) -> Group:
    rng = np.random.default_rng(0)
    length, text = config.sampling.max_new_tokens, "four" * config.sampling.max_new_tokens
    rollouts = [
        Rollout.of_completion(
            tokens=rng.integers(0, vocab, length, dtype=np.int32),
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
    assert format_bytes(num_bytes) == text
