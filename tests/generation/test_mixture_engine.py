"""A mixture of experts from the learner to the real SGLang, which samples with the published weights."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace.common.config import EngineConfig
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.wire import Sampling
from headrace.generation.engine.client import Engine
from headrace.generation.engine.completions import Completion
from headrace.generation.engine.server import EngineServer
from headrace.learner.model.packing import pack
from headrace.learner.model.policy import Policy
from headrace.learner.training.trainer import Trainer
from tests.learner.test_policy import as_rollout, as_sample
from tests.learner.test_trainer import STEPS, make_batch, make_config
from tests.support.factories import make_ticket
from tests.support.tiny_models import make_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "mixture", "qwen3_moe")


@pytest.fixture(scope="module")
def server(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    started = EngineServer(EngineConfig(device="cpu"), "float32", tmp_path_factory.mktemp("sglang") / "sglang.log")
    asyncio.run(started.start(mixture, 1))
    yield started
    asyncio.run(started.stop())


def test_a_step_reaches_the_engine_expert_by_expert(mixture: Path, server: EngineServer, tmp_path: Path) -> None:
    """The swap is confirmed by checksums of the engine's stacked experts, and log-probabilities equal the learner's."""
    config = make_config(mixture, optimizer={"lr": 3e-2})
    trainer = Trainer(config, Policy(config.model, config.learner))
    before = {name: weight.detach().clone() for name, weight in trainer.policy.published_weights().items()}
    trainer.train(make_batch(trainer), 0, STEPS)
    after = {name: weight.detach() for name, weight in trainer.policy.published_weights().items()}
    moved = [name for name in after if ".experts." in name and not torch.equal(before[name], after[name])]
    assert len(moved) > len([name for name in after if ".experts." in name]) / 2
    trainer.policy.save(tmp_path / "2", load_tokenizer(config.model))
    ticket = make_ticket(prompt_tokens=[5, 6, 7, 8], num_completions=8, sampling=Sampling(1.0, 24, [1]))

    async def swap_and_sample() -> list[Completion]:
        engine = Engine(server.url)
        try:
            await engine.swap(tmp_path / "2", 2)
            return await engine.generate(ticket)
        finally:
            await engine.aclose()

    completions = asyncio.run(swap_and_sample())
    assert all(span.version == 2 for completion in completions for span in completion.version_spans)
    (micro_batch,) = pack([as_sample([5, 6, 7, 8], as_rollout(one), 1.0) for one in completions], 10_000)
    with torch.no_grad():
        gap = trainer.policy.logprobs(micro_batch) - torch.from_numpy(micro_batch.behaviour_logprobs.copy())
    assert gap.abs().max().item() < 1e-4
