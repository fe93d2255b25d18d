"""Models with other links between tokens than attention are computed one sequence per row."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from headrace.common.config import LearnerConfig, ModelConfig
from headrace.learner.model.packing import MicroBatch, Sample, pack
from headrace.learner.model.policy import Policy
from headrace.learner.model.self_check import can_share_prompts
from tests.support.factories import make_group, make_rollout
from tests.support.tiny_models import KINDS, VOCABULARY, make_checkpoint, make_model

UNSHARED = [kind for kind in KINDS if kind != "qwen3_moe"]
SLOW = ("rwkv", "mamba", "qwen3_5_moe_text")
"""Computed token by token in plain torch, or similar to another kind."""
CPU = LearnerConfig(device="cpu", gradient_checkpointing=False, logprob_chunk_tokens=7)


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param)


def a_micro_batch() -> MicroBatch:
    """Three groups with completions of many lengths; one has a single token, and parts are masked."""
    generator = np.random.default_rng(0)
    samples = []
    for index, (prompt, lengths) in enumerate([(7, [1, 12, 30]), (1, [4, 4]), (70, [5])]):
        group = make_group(f"0-{index}", prompt_tokens=generator.integers(5, VOCABULARY, prompt).tolist())
        for length in lengths:
            mask = bytes([1, *generator.integers(0, 2, length - 1).tolist()])
            tokens = tuple(generator.integers(5, VOCABULARY, length).tolist())
            rollout = make_rollout(tokens=tokens, loss_mask=mask, behaviour_logprobs=np.zeros(sum(mask), np.float32))
            samples.append(Sample(group, rollout, 1.0, np.zeros(sum(mask), int)))
    (micro_batch,) = pack(samples, 10_000)
    return micro_batch


def plain_logprobs(folder: Path, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of each sequence alone, by transformers; and the gradient of `weighted`, by parameter."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for sample in micro_batch.samples:
        (segment,) = sample.rollout.segments
        prompt, completion = sample.group.ticket.prompt_tokens, segment.tokens.tolist()
        ids = torch.tensor([[*prompt, *completion]])
        logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        each = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        found.append(each[torch.frombuffer(bytearray(segment.loss_mask), dtype=torch.bool)])
    return torch.cat(found), gradients(model, torch.cat(found))


def gradients(model: torch.nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_logprobs_and_gradients_are_those_of_each_sequence_alone(folder: Path) -> None:
    learner = CPU.model_copy(update={"gradient_checkpointing": "qwen" in folder.name})
    policy = Policy(ModelConfig(path=str(folder), dtype="float32"), learner)
    assert policy.scorer.shares_prompts == (folder.name not in UNSHARED)
    micro_batch = a_micro_batch()
    expected, expected_gradients = plain_logprobs(folder, micro_batch)
    found = policy.logprobs(micro_batch)
    assert torch.allclose(found, expected, atol=2e-5)
    ours = gradients(policy.model, found)
    assert ours.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name


def test_before_any_update_the_published_weights_equal_the_checkpoint(folder: Path) -> None:
    """Names, shapes and bytes, before any update."""
    policy = Policy(ModelConfig(path=str(folder), dtype="float32"), CPU)
    checkpoint, tensors = load_file(folder / "model.safetensors"), policy.published_weights()
    assert tensors.keys() == checkpoint.keys()
    for name, expected in checkpoint.items():
        assert tensors[name].shape == expected.shape and tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name].detach(), expected), name


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2", "gpt_oss"])
def test_a_model_that_cannot_share_prompts_is_logged_with_the_reason(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A state that runs through all tokens, a convolution, attention that does more than ours."""
    with caplog.at_level(logging.WARNING):
        assert not can_share_prompts(make_model(kind), kind)
    assert f"model {kind} computes a prompt once for each completion" in caplog.text


def test_a_model_that_is_not_causal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model 'ahead' cannot be trained: .*expected a causal language model"):
        model = make_model("qwen3")
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
        can_share_prompts(model, "ahead")


@pytest.mark.parametrize("kind", ["granite", "gpt_neox"])
def test_a_head_with_more_than_a_weight_is_refused(kind: str) -> None:
    """It scales or adds: log-probabilities are computed only from its weight and the hidden states."""
    model = make_model(kind, logits_scaling=2.0)
    if kind == "gpt_neox":
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.ones(VOCABULARY))
    with pytest.raises(ValueError, match=f"model '{kind}' cannot be trained: its logits are off by"):
        can_share_prompts(model, kind)
