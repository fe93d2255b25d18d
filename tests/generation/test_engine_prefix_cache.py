"""Episodes of several turns against the real SGLang with its prefix cache: what is found in it, and log-probabilities.

These are those of one whole prefill, whatever swaps happened between turns and within them.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from headrace.common.wire import Sampling
from headrace.generation.engine.client import Engine
from headrace.generation.engine.completions import SampledTurn, TurnRequest
from tests.generation.test_engine import IN_FLIGHT, PROMPT, next_version, reference_logprobs, run, until_running
from tests.generation.test_engine import write_endless_policy as write_policy

BRIDGE = [70, 71, 72, 73]


@pytest.fixture(scope="module")
def policies(demo_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("policies")
    return [write_policy(demo_policy, root / f"seed-{seed}", seed) for seed in (1, 2)]


class Episode:
    """One segment, turn by turn."""

    def __init__(self, engine: Engine, prompt: list[int] = PROMPT) -> None:
        self.engine = engine
        self.prompt = prompt
        self.tokens: list[int] = []
        """Behind the prompt."""
        self.turns: list[tuple[int, SampledTurn]] = []
        """Each with its place in `tokens`."""

    async def take(self, max_new_tokens: int = 30, temperature: float = 1.0) -> SampledTurn:
        if self.tokens:
            self.tokens += BRIDGE
        request = TurnRequest([*self.prompt, *self.tokens], Sampling(temperature, max_new_tokens, []), uuid.uuid4().hex)
        turn = await self.engine.sample_turn(request)
        assert turn.cached_tokens < len(request.prompt_tokens), "the last one is always computed"
        self.turns.append((len(self.tokens), turn))
        self.tokens += turn.completion.tokens
        return turn

    def expect_exact(self, demo_policy: Path, weights: dict[int, Path]) -> None:
        """Every token has the log-probability that a whole prefill gives it under the weights of its version."""
        found = {
            version: reference_logprobs(demo_policy, folder, self.tokens, prompt=self.prompt)
            for version, folder in weights.items()
        }
        for start, turn in self.turns:
            for span in turn.completion.version_spans:
                expected = found[span.version][start + span.start : start + span.end]
                error = np.abs(expected - turn.completion.behaviour_logprobs[span.start : span.end])
                assert error.max() < 1e-4, f"{error.max()} in a turn at {start}, span {span}"


def play(
    url: str, policies: list[Path], body: Callable[[Engine, int], Awaitable[list[Episode]]]
) -> tuple[list[Episode], int]:
    """Serves the first policy and plays; returns the episodes and its version."""

    async def with_policy(engine: Engine) -> tuple[list[Episode], int]:
        version = await next_version(engine)
        await engine.swap(policies[0], version)
        return await body(engine, version), version

    return run(url, with_policy)


def test_later_turns_find_the_sampled_tokens_in_the_cache(
    engine_url: str, demo_policy: Path, policies: list[Path]
) -> None:
    async def body(engine: Engine, version: int) -> list[Episode]:
        episodes = [Episode(engine), Episode(engine, PROMPT[:12]), Episode(engine, [*PROMPT[:12], 300, 301])]
        for _ in range(4):
            await asyncio.gather(*(episode.take() for episode in episodes))
        return episodes

    episodes, version = play(engine_url, policies, body)
    for episode in episodes:
        episode.expect_exact(demo_policy, {version: policies[0]})
        for (_, before), (start, turn) in zip(episode.turns, episode.turns[1:], strict=False):
            end_of_reply = len(episode.prompt) + start - len(BRIDGE)
            assert len(before.completion.tokens) == 30
            assert turn.cached_tokens >= end_of_reply - 1, "only the last sampled token had no KV"
            assert turn.cached_tokens < end_of_reply + len(BRIDGE)


def test_a_swap_between_turns_leaves_no_cached_token(engine_url: str, demo_policy: Path, policies: list[Path]) -> None:
    async def body(engine: Engine, version: int) -> list[Episode]:
        episode = Episode(engine)
        for swapped in range(4):
            await episode.take()
            assert (await episode.take()).cached_tokens > 0
            await engine.swap(policies[(swapped + 1) % 2], version + swapped + 1)
            assert (await episode.take()).cached_tokens == 0
        return [episode]

    [episode], version = play(engine_url, policies, body)
    spans = [span for _, turn in episode.turns for span in turn.completion.version_spans]
    assert [span.version - version for span in spans] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    episode.expect_exact(demo_policy, {version + swapped: policies[swapped % 2] for swapped in range(5)})


def test_a_swap_within_a_turn_leaves_no_cached_token_of_the_old_weights(
    engine_url: str, demo_policy: Path, policies: list[Path]
) -> None:
    """Of turns in flight, and of those that begin like an older turn."""

    async def body(engine: Engine, version: int) -> list[Episode]:
        episodes = [Episode(engine) for _ in range(2)]
        for episode in episodes:
            await episode.take()
        turns = asyncio.gather(*(episode.take(IN_FLIGHT) for episode in episodes))
        await until_running(engine, len(episodes))
        await engine.swap(policies[1], version + 1)
        late = Episode(engine, episodes[0].prompt + episodes[0].tokens[:20])
        await late.take()
        await turns
        for episode in episodes:
            await episode.take()
        return [*episodes, late]

    episodes, version = play(engine_url, policies, body)
    for episode in episodes:
        episode.expect_exact(demo_policy, {version: policies[0], version + 1: policies[1]})
    for episode in episodes[:2]:
        in_flight = episode.turns[1][1]
        assert [span.version for span in in_flight.completion.version_spans] == [version, version + 1]
        assert episode.turns[2][1].cached_tokens > IN_FLIGHT, "its KV is of the new weights"


def test_more_turns_than_places_and_a_swap_among_them(engine_url: str, demo_policy: Path, policies: list[Path]) -> None:
    """SGLang empties the cache although requests wait."""

    async def body(engine: Engine, version: int) -> list[Episode]:
        episodes = [Episode(engine, [*PROMPT, 100 + place]) for place in range(300)]
        turns = asyncio.gather(*(episode.take(60) for episode in episodes))
        await until_running(engine, 256)
        await engine.swap(policies[1], version + 1)
        await turns
        return episodes

    episodes, version = play(engine_url, policies, body)
    versions = [{span.version for span in episode.turns[0][1].completion.version_spans} for episode in episodes]
    assert {version, version + 1} in versions and {version + 1} in versions
    for episode in episodes[::37]:
        episode.expect_exact(demo_policy, {version: policies[0], version + 1: policies[1]})


def test_a_models_generation_config_does_not_change_the_distribution(
    engine_url: str, demo_policy: Path, policies: list[Path]
) -> None:
    """That of the session's engine has top_k 1, a low temperature and a penalty of repetitions."""

    async def body(engine: Engine, version: int) -> list[Episode]:
        episodes = [Episode(engine) for _ in range(16)]
        await asyncio.gather(*(episode.take() for episode in episodes))
        return episodes

    episodes, version = play(engine_url, policies, body)
    assert len({tuple(episode.tokens) for episode in episodes}) == 16
    for episode in episodes[:4]:
        episode.expect_exact(demo_policy, {version: policies[0]})


def test_an_aborted_turn_ends(engine_url: str, policies: list[Path]) -> None:
    async def body(engine: Engine, version: int) -> list[Episode]:
        kept = asyncio.create_task(engine.sample_turn(TurnRequest(PROMPT, Sampling(1.0, 900, []), "episode-10")))
        aborted = asyncio.create_task(engine.sample_turn(TurnRequest(PROMPT, Sampling(1.0, 900, []), "episode-1")))
        await until_running(engine, 2)
        await engine.abort("episode-1")
        with pytest.raises(Exception, match="turn episode-1: finished with abort"):
            await aborted
        assert not kept.done()
        kept.cancel()
        await until_running(engine, 0)
        return []

    play(engine_url, policies, body)


def test_the_engine_says_that_it_found_no_parsers(engine_url: str) -> None:
    """In the demo policy's chat template."""

    async def body(engine: Engine) -> None:
        with pytest.raises(Exception, match="the engine has no parser for tool calls"):
            await engine.check_tool_calls()

    run(engine_url, body)
