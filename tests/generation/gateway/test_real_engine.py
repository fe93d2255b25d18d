"""Episodes through the real SGLang on a CPU: one full prefill of each recorded segment, by transformers in float32,
gives the log-probabilities that the engine reported turn by turn."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from headrace.common.config import ModelConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.environments.limits import END_OF_CONTEXT
from headrace.common.models.bridge import Bridge
from headrace.common.models.chat_template import ChatTemplate
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.wire import Group, Limits, Sampling, Segment, Ticket, check_group
from headrace.generation.engine.client import Engine, EngineError
from headrace.generation.engine.completions import TurnRequest
from headrace.generation.gateway.group_prompts import GroupPrompts
from headrace.generation.gateway.server import Gateway
from tests.generation.test_engine import next_version, reference_logprobs, run, until_running, write_endless_policy
from tests.support.episodes import group_of
from tests.support.gateways import Client, a_client

QUESTION = {"role": "user", "content": "3 + 4 = "}
CONTEXT = 1024
"""Of the demo's policy."""
LIMITS = Limits(max_turns=8, max_tokens=2000, max_context_tokens=1000, max_segments=2)
STOPS = [1]


@pytest.fixture(scope="module")
def policies(demo_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("policies")
    return [write_endless_policy(demo_policy, root / f"seed-{seed}", seed) for seed in (1, 2)]


async def play(engine: Engine, client: Client, policies: list[Path], version: int) -> None:
    """Four turns of one conversation, the weights swapped between two of them and within one; then a rewritten history,
    and the first conversation taken up again."""
    messages = [QUESTION]

    async def turn(max_tokens: int) -> None:
        messages.append((await client.ask(*messages, max_tokens=max_tokens))["message"])
        messages.append({"role": "user", "content": f" and {len(messages)} + 6 = "})

    await turn(20)
    await turn(20)
    await engine.swap(policies[1], version + 1)
    await turn(20)
    swapped = asyncio.create_task(turn(600))
    await until_running(engine, 1)
    await engine.swap(policies[0], version + 2)
    await swapped
    await client.ask(QUESTION, {"role": "user", "content": "Begin again. "}, max_tokens=20)
    await turn(20)


def test_a_full_prefill_of_each_segment_gives_the_recorded_logprobs(
    engine_url: str, demo_policy: Path, policies: list[Path]
) -> None:
    chat = ChatTemplate(load_tokenizer(ModelConfig(path=str(demo_policy))), ModelConfig(path=str(demo_policy)))
    bridge = Bridge(chat, STOPS)

    async def body(engine: Engine) -> tuple[int, Group]:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        gateway = Gateway(engine, bridge, EnvironmentConfig(), "policy")
        ticket = Ticket(
            "0-0", "train", chat.encode([QUESTION]), [QUESTION], {}, 1, Sampling(1.0, 600, []), 0, limits=LIMITS
        )
        async with gateway.serve():
            async with a_client(gateway, ticket) as client:
                await play(engine, client, policies, version)
            prompts = GroupPrompts(ticket.prompt_tokens)
            return version, group_of(ticket, client.episode.record.rollout(1.0, {}, prompts), prompts.further)

    version, group = run(engine_url, body)
    check_group(group)
    first, second = group.segments
    assert [span.version for span in first.version_spans] == [version, version + 1, version + 2]
    assert (first.origin, second.origin) == ("conversation", "history")
    weights = {version: policies[0], version + 1: policies[1], version + 2: policies[0]}
    for segment in (first, second):
        expect_prefilled(demo_policy, weights, list(map(int, group.prompt(segment))), segment)


def expect_prefilled(demo_policy: Path, weights: dict[int, Path], prompt: list[int], segment: Segment) -> None:
    sampled = np.frombuffer(segment.loss_mask, np.uint8) == 1
    for span in segment.version_spans:
        expected = reference_logprobs(demo_policy, weights[span.version], segment.tokens.tolist(), prompt=prompt)[
            sampled
        ]
        error = np.abs(expected - segment.behaviour_logprobs)
        assert error[span.start : span.end].max() < 1e-4
        others = np.delete(error, slice(span.start, span.end))
        assert not len(others) or others.max() > 1e-2, "the other tokens are another policy's"


def test_up_to_the_end_of_the_usable_context_the_engine_samples_as_many_tokens_as_are_asked_for(
    engine_url: str, policies: list[Path]
) -> None:
    async def body(engine: Engine) -> list[int]:
        await engine.swap(policies[0], await next_version(engine))
        usable = CONTEXT - END_OF_CONTEXT
        prompts = [list(range(40, 60)) * 50 + [40] * more for more in (10, usable - 1 - 1000)]
        requests = [
            TurnRequest(prompt, Sampling(1.0, usable - len(prompt), []), f"{len(prompt)}") for prompt in prompts
        ]
        turns = [await engine.sample_turn(request) for request in requests]
        with pytest.raises(EngineError, match="Input length"):
            await engine.sample_turn(TurnRequest([40] * usable, Sampling(1.0, 1, []), "beyond"))
        return [len(turn.completion.tokens) for turn in turns]

    assert run(engine_url, body) == [8, 1]
