"""The learner's log-probabilities: against transformers, token by token, and against the real SGLang."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.common.config import LearnerConfig, ModelConfig
from headrace.common.hardware import device
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.wire import Group, Rollout, Sampling, Timings, VersionSpan
from headrace.generation.engine.client import Engine
from headrace.generation.engine.completions import Completion
from headrace.generation.engine.server import EngineServer
from headrace.learner.model.packing import Sample, pack
from headrace.learner.model.policy import Policy, pick_device
from tests.support.factories import make_rollout, make_ticket

CPU = LearnerConfig(device="cpu", gradient_checkpointing=False, logprob_chunk_tokens=7)


@pytest.fixture(scope="module")
def policy(demo_policy: Path) -> Policy:
    return Policy(ModelConfig(path=str(demo_policy), dtype="float32"), CPU)


def as_sample(prompt: list[int], rollout: Rollout, temperature: float) -> Sample:
    sampling = Sampling(temperature, 64, [1])
    ticket = make_ticket(f"0-{len(prompt)}", prompt_tokens=prompt, num_completions=1, sampling=sampling)
    group = Group(ticket, [rollout], "r", Timings(0, 0, 0))
    return Sample(group, rollout, 1.0, np.zeros(rollout.num_trained_tokens, int))


def test_equals_a_plain_forward_pass_whatever_the_lengths_and_the_temperature(
    policy: Policy, demo_policy: Path
) -> None:
    plain_model = AutoModelForCausalLM.from_pretrained(demo_policy, dtype=torch.float32)
    generator = np.random.default_rng(0)
    samples = []
    for length, temperature in ((3, 1.0), (17, 0.7), (9, 1.3), (1, 1.0)):
        tokens = tuple(generator.integers(5, 500, length).tolist())
        samples.append(
            as_sample(generator.integers(5, 500, length + 2).tolist(), make_rollout(tokens=tokens), temperature)
        )
    (micro_batch,) = pack(samples, 1000)
    with torch.no_grad():
        ours = policy.logprobs(micro_batch)
    for row, sample in enumerate(sorted(samples, key=lambda s: -s.num_tokens)):
        prompt = sample.group.ticket.prompt_tokens
        ids = torch.tensor([prompt + sample.rollout.segments[0].tokens.tolist()])
        with torch.no_grad():
            logits = plain_model(ids).logits[0].double() / sample.group.ticket.sampling.temperature
        plain = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        start, end = micro_batch.sequence_offsets[row : row + 2]
        assert torch.allclose(ours[start:end].double(), plain, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_agrees_with_sglang_within_1e_4(
    policy: Policy, engine_server: EngineServer, demo_policy: Path, temperature: float
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(demo_policy)))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tom has 13 apples and buys 15. How many apples does he have?"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ticket = make_ticket(
        prompt_tokens=tokenizer.encode(text, add_special_tokens=False),
        num_completions=8,
        sampling=Sampling(temperature, 40, [tokenizer.eos_token_id]),
    )

    async def sample() -> list[Completion]:
        engine = Engine(engine_server.url)
        try:
            version = (await engine.weight_version() or 0) + 1
            await engine.swap(demo_policy, version)
            return await engine.generate(ticket)
        finally:
            await engine.aclose()

    completions = asyncio.run(sample())
    samples = [as_sample(ticket.prompt_tokens, as_rollout(completion), temperature) for completion in completions]
    (micro_batch,) = pack(samples, 10_000)
    with torch.no_grad():
        gap = policy.logprobs(micro_batch) - torch.from_numpy(micro_batch.behaviour_logprobs.copy())
    assert gap.abs().max().item() < 1e-4


def as_rollout(completion: Completion) -> Rollout:
    return make_rollout(
        tokens=tuple(completion.tokens),
        behaviour_logprobs=completion.behaviour_logprobs,
        version_spans=[VersionSpan(1, 0, len(completion.tokens))],
    )


def test_gradient_checkpointing_changes_nothing(demo_policy: Path, policy: Policy) -> None:
    again = Policy(ModelConfig(path=str(demo_policy), dtype="float32"), LearnerConfig(device="cpu"))
    (micro_batch,) = pack([as_sample([5, 6, 7], make_rollout(tokens=(8, 9, 10)), 1.0)], 100)
    gradients = []
    for one in (policy, again):
        one.logprobs(micro_batch).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None})
        one.model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5)


def test_the_saved_policy_loads_in_transformers(policy: Policy, demo_policy: Path, tmp_path: Path) -> None:
    policy.save(tmp_path, load_tokenizer(ModelConfig(path=str(demo_policy))))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, policy.published_weights()[name].detach())


def test_cuda_without_a_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"learner\.device is 'cuda', but torch sees no GPU"):
        pick_device("cuda")
    monkeypatch.setattr(device, "why_not_cuda", lambda: "")
    with pytest.raises(ValueError, match=r"learner\.device is 'auto', but torch sees no GPU"):
        pick_device("auto")  # where the engine takes it


def test_a_model_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        Policy(ModelConfig(path=str(tmp_path)), CPU)


def test_masks_and_versions_survive_a_round_trip_through_a_sample() -> None:
    mask, logprobs = bytes([1, 1, 0, 1]), np.zeros(3, np.float32)
    rollout = make_rollout(tokens=(8, 9, 50, 1), loss_mask=mask, behaviour_logprobs=logprobs)
    sample = as_sample([5], rollout, 1.0)
    ((one,),) = [micro_batch.passes for micro_batch in pack([sample], 100)]
    assert one.targets.tolist() == [8, 9, 1]
