"""Published weights have the checkpoint's names, whatever transformers converts on loading, such as experts."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headrace.common.config import LearnerConfig, ModelConfig
from headrace.common.models.tokenizer import load_tokenizer
from headrace.generation.tensors.shapes import expected_shapes
from headrace.learner.assembly import _save_model_folders
from headrace.learner.checkpoints.best import CONFIG_FOLDER
from headrace.learner.commands import export
from headrace.learner.model import checkpoint_layout
from headrace.learner.model.policy import Policy
from headrace.learner.training.trainer import Trainer
from tests.learner.test_trainer import STEPS, make_batch, make_config
from tests.support.tiny_models import make_checkpoint

CPU = LearnerConfig(device="cpu", gradient_checkpointing=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "mixture", "qwen3_moe")


@pytest.fixture
def copy(mixture: Path, tmp_path: Path) -> Path:
    return shutil.copytree(mixture, tmp_path / "copy")


def load(folder: Path, dtype: Any = "float32") -> Policy:
    return Policy(ModelConfig(path=str(folder), dtype=dtype), CPU)


def trained(folder: Path, dtype: str) -> Trainer:
    config = make_config(folder, model={"path": str(folder), "dtype": dtype}, optimizer={"lr": 1e-2})
    trainer = Trainer(config, Policy(config.model, config.learner))
    trainer.train(make_batch(trainer), 0, STEPS)
    return trainer


def change(file: Path, tensors: Mapping[str, Tensor | None]) -> None:
    """Adds tensors to a safetensors file, and removes those that are None."""
    changed = load_file(file) | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_a_step_each_expert_is_published_separately(mixture: Path, tmp_path: Path, dtype: str) -> None:
    """The same tensors are published, saved, and exported from a checkpoint; transformers reads them back."""
    trainer = trained(mixture, dtype)
    policy, run = trainer.policy, tmp_path / "run"
    start, tensors = (
        load_file(mixture / "model.safetensors"),
        {n: w.detach() for n, w in policy.published_weights().items()},
    )
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(mixture)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, start[name].to(tensor.dtype))]
    assert {name.split(".")[-2] for name in changed} >= {"gate_proj", "up_proj", "down_proj", "gate", "q_proj"}
    tokenizer = load_tokenizer(trainer.config.model)
    policy.save(tmp_path / "policy", tokenizer)
    _save_model_folders(policy, run / CONFIG_FOLDER, tokenizer)
    checkpoint = run / "checkpoints" / "checkpoint-000001-000001"
    checkpoint.mkdir(parents=True)
    trainer.copy_state()
    files = trainer.write_copy(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "read_record", lambda _: type("Record", (), {"files": files}))
        export._from_checkpoint(run, checkpoint, tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    for folder in ("policy", "exported"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter.float(), dict(policy.model.named_parameters())[name].float()), name


def test_only_one_parameter_is_converted_at_a_time(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of two parameters' experts alternate; nevertheless each parameter is converted only once."""
    policy, made = load(mixture), []
    revert = checkpoint_layout._revert

    def watch(model: PreTrainedModel, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made.append(list(parts))
        return revert(model, parts)

    tensors = policy.published_weights()
    monkeypatch.setattr(checkpoint_layout, "_revert", watch)
    for name in sorted(tensors):
        tensors[name].detach()
    experts = [name for name, _ in policy.model.named_parameters() if ".experts." in name]
    assert sorted(made) == [[name] for name in sorted(experts)] and experts


def test_tensors_that_the_policy_lacks_are_published_unchanged(copy: Path, tmp_path: Path) -> None:
    """The head, which is tied and stored a second time, is not published: engines take it from the embedding."""
    extra = {"mtp.head.weight": torch.arange(6.0).reshape(2, 3), "model.visual.patch.weight": torch.ones(4)}
    change(copy / "model.safetensors", extra)
    tensors = load(copy).published_weights()
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(copy)
    assert all(torch.equal(tensors[name].detach(), tensor) for name, tensor in extra.items())
    policy = load(copy)
    _save_model_folders(policy, tmp_path / CONFIG_FOLDER, load_tokenizer(ModelConfig(path=str(copy))))
    parameters = {name: parameter.detach() for name, parameter in policy.model.named_parameters()}
    unchanged = tmp_path / "model-unchanged" / "model.safetensors"
    exported = checkpoint_layout.published_tensors(parameters, tmp_path / CONFIG_FOLDER, unchanged)
    assert exported.keys() == tensors.keys()


def test_a_tied_head_that_is_stored_again_is_not_published(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tied", "qwen3", tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder / "model.safetensors", {"lm_head.weight": embedding})
    tensors = load(folder).published_weights()
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(folder)
    assert "lm_head.weight" not in tensors
    change(folder / "model.safetensors", {"lm_head.weight": embedding + 1})  # transformers unties it, engines do not
    with pytest.raises(ValueError, match="a head that differs from the embedding"):
        load(folder)


def test_persistent_buffers_are_published_and_exported(tmp_path: Path) -> None:
    """A router's bias is a buffer, not a parameter, and no update changes it."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    folder = make_checkpoint(tmp_path / "biased", "glm4_moe", **experts, n_group=1)
    policy = load(folder)
    tensors = policy.published_weights()
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes(folder)
    assert any(name.endswith("e_score_correction_bias") for name in tensors)
    _save_model_folders(policy, tmp_path / CONFIG_FOLDER, load_tokenizer(ModelConfig(path=str(folder))))
    parameters = {name: parameter.detach() for name, parameter in policy.model.named_parameters()}
    unchanged = tmp_path / "model-unchanged" / "model.safetensors"
    assert checkpoint_layout.published_tensors(parameters, tmp_path / CONFIG_FOLDER, unchanged).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lm_head.weight": None}, r"its checkpoint has no tensor lm_head\.weight, so engines"),
        ({"model.norm.weight": None, "lm_head.weight": None}, r"no tensor lm_head\.weight and 1 more"),
        ({"model.extra.weight": torch.zeros(2, dtype=torch.float8_e4m3fn)}, r"model\.extra\.weight is F8_E4M3"),
    ],
)
def test_a_checkpoint_with_other_names_is_refused_at_the_start(
    copy: Path, changes: Mapping[str, Tensor | None], problem: str
) -> None:
    change(copy / "model.safetensors", changes)
    with pytest.raises(ValueError, match=problem):
        load(copy)


def test_a_second_copy_under_other_names_is_ignored(copy: Path) -> None:
    """Like Mistral's `consolidated.safetensors`, beside an index that does not list it."""
    names = load_file(copy / "model.safetensors").keys()
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"tok_embeddings.weight": torch.zeros(2)}, copy / "consolidated.safetensors")
    assert load(copy).published_weights().keys() == expected_shapes(copy).keys() == names
