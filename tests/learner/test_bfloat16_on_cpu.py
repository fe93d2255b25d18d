"""bfloat16 weights on a CPU that emulates bfloat16: computed in float32, published unchanged."""

from pathlib import Path

import pytest
import torch

from headrace.common.config import LearnerConfig, ModelConfig
from headrace.common.hardware import device as device_module
from headrace.learner.model.policy import Policy
from headrace.learner.training.trainer import Trainer
from tests.learner.test_trainer import STEPS, make_batch, make_config
from tests.support.tiny_models import make_checkpoint

CPU_INFO = {
    "flags\t\t: fpu avx2 fma f16c": False,
    "flags\t\t: fpu avx512f avx512vl avx512_bf16": True,
    "flags\t\t: fpu avx512f amx_tile amx_bf16": True,
    "Features\t: fp asimd bf16 i8mm": True,
    "Features\t: fp asimd fphp": False,
}


@pytest.mark.parametrize("line", CPU_INFO)
def test_bfloat16_units_are_detected_by_the_kernels_flags(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nbugs\t\t: bf16_of_no_use\n{line}\n\nprocessor\t: 1\n{line}\n")
    monkeypatch.setattr(device_module, "_CPU_INFO", tmp_path / "cpuinfo")
    assert device_module.has_bfloat16_units() == CPU_INFO[line]
    monkeypatch.setattr(device_module, "_CPU_INFO", tmp_path / "none")
    assert not device_module.has_bfloat16_units()


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_weights_stay_bfloat16_values(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after a step the weights in the computation equal the published ones; masters are rounded only for
    publishing."""
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: False)
    folder = make_checkpoint(tmp_path / kind, kind)
    config = make_config(folder, model={"path": str(folder), "dtype": "bfloat16"}, optimizer={"lr": 1e-3})
    trainer = Trainer(config, Policy(config.model, config.learner))
    for num_steps in range(2):
        computed = {name: p.detach() for name, p in trainer.policy.model.named_parameters()}
        named = trainer.policy._loaded.mapping.convert(computed)
        for name, weight in trainer.policy.published_weights().items():
            published = weight.detach()
            assert published.dtype == weight.dtype == torch.bfloat16
            assert torch.equal(published.float(), named[name].detach()), name
        is_between = [not torch.equal(m, m.bfloat16().float()) for m in trainer.optimizer.masters.values()]
        assert all(p.dtype == torch.float32 for p in computed.values()) and any(is_between) == (num_steps > 0)
        trainer.train(make_batch(trainer), num_steps, STEPS)


def test_a_weight_that_transformers_keeps_in_float32_is_published_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not rounded: transformers keeps a router's bias in float32."""
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: False)
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    folder = make_checkpoint(tmp_path / "glm", "glm4_moe", **experts, n_group=1)
    tensors = Policy(ModelConfig(path=str(folder)), LearnerConfig(device="cpu")).published_weights()
    dtypes = {name: weight.detach().dtype for name, weight in tensors.items()}
    assert {name: weight.dtype for name, weight in tensors.items()} == dtypes
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if name.endswith("e_score_correction_bias")} != set()


def test_a_cpu_with_bfloat16_units_computes_in_bfloat16(demo_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "has_bfloat16_units", lambda: True)
    policy = Policy(ModelConfig(path=str(demo_policy)), LearnerConfig(device="cpu"))
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16} and not policy.rounded_to
