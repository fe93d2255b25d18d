"""The kill matrix's own parts for episodes: its task and agent, its faults, its checks of groups. No run is started."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer

from chaos.episodes.faults import freeze_environment_worker, kill_agent, kill_environment_worker
from chaos.episodes.groups import GroupChecks
from chaos.episodes.guessing_with_agents import AGENT, AGENT_EVERY, digest
from chaos.launched import ENVIRONMENT_WORKER, children_of, words_of
from chaos.schedule import Fault, Kind
from chaos.test_bed import InjectedFault
from headrace.common.config import TaskConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.tasks import Outcome
from headrace.common.wire import Group, Limits, Rollout, Ticket, Timings, Turn, encode
from headrace.generation.environments.messages import EpisodeStart
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.environments.process import EpisodeFailed
from tests.support.chat_endpoint import Answer, ChatEndpoint, at_limit, refuses, says
from tests.support.factories import make_segment, make_ticket
from tests.support.guard import GUARD_S

POLICY = Path("headrace/demo/guessing-policy")
TASK = "chaos.episodes.guessing_with_agents:GuessingWithAgents"
LIMITS = Limits(max_turns=6, max_tokens=24, max_context_tokens=64, max_segments=1)
TICKET = make_ticket(reference={"secret": 40}, num_completions=1, limits=LIMITS)
WITH_AGENT, WITHOUT_AGENT = 5 * AGENT_EVERY, 5 * AGENT_EVERY + 1
"""Seeds of episodes."""


# The task


@asynccontextmanager
async def a_pool(**settings: Any) -> AsyncIterator[EnvironmentPool]:
    pool = EnvironmentPool(TaskConfig(name=TASK), EnvironmentConfig(**settings))
    async with asyncio.timeout(GUARD_S):
        await pool.start()
        try:
            yield pool
        finally:
            await pool.close()


def play(pool: EnvironmentPool, endpoint: ChatEndpoint, seed: int) -> Any:
    return pool.run(EpisodeStart(TICKET, 0, 0, seed, endpoint.base_url, "secret", "policy"), lambda: 0.0)


def in_turn(*answers: Answer) -> Callable[[dict[str, Any]], Answer]:
    left = list(answers)
    return lambda body: left.pop(0)


def test_an_episode_says_what_it_saw_with_an_agent_and_without() -> None:
    async def scenario() -> None:
        async with a_pool() as pool:
            outcomes: list[Outcome] = []
            for seed in (WITH_AGENT, WITHOUT_AGENT):
                busy = refuses(503, "the engine restarts")
                async with ChatEndpoint(in_turn(busy, says("32"), says("48"), says("40"))) as endpoint:
                    outcomes.append(await play(pool, endpoint, seed))
                [*_, last] = endpoint.requests
                assert [one["content"] for one in last.body["messages"][1:]] == ["32", "higher", "48", "lower"]
                retries = [one.headers["x-stainless-retry-count"] for one in endpoint.requests]
                assert retries == ["0", "1", "0", "0"] and last.headers["Authorization"] == "Bearer secret"
            names = [outcome.metrics.pop("episode") for outcome in outcomes]
            assert names[0] != names[1]
            assert [outcome.metrics.pop("is_agent") for outcome in outcomes] == [1, 0]
            seen = {"replies": 3.0, "digest": digest(["32", "48", "40"])}
            assert outcomes == [Outcome(1.0, {"guesses": 3.0, "consistent": 1.0, **seen})] * 2

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", [WITH_AGENT, WITHOUT_AGENT])
def test_what_is_said_at_a_limit_is_no_reply(seed: int) -> None:
    async def scenario() -> None:
        async with a_pool() as pool, ChatEndpoint(in_turn(says("32"), at_limit("max_tokens"))) as endpoint:
            outcome = await play(pool, endpoint, seed)
            assert (outcome.reward, outcome.metrics["replies"]) == (0.0, 1.0)

    asyncio.run(scenario())


# The faults


class TestBed:
    """In place of a run: one environment worker, a child of this process."""

    __test__ = False

    def __init__(self) -> None:
        self.launched = SimpleNamespace(num_replicas=1, environment_workers=lambda index: self.workers())

    def workers(self) -> list[psutil.Process]:
        return [child for child in children_of(psutil.Process()) if ENVIRONMENT_WORKER in words_of(child)]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + GUARD_S
        while not condition():
            assert time.monotonic() < deadline, what


Inject = Callable[[Any, Fault], InjectedFault]


async def hit(inject: Inject) -> tuple[InjectedFault, Outcome | BaseException, ChatEndpoint]:
    """An episode that is hit between its first reply and the second; the fault is ended afterwards."""
    may_answer = asyncio.Event()

    async def answer(body: dict[str, Any]) -> Answer:
        if len(body["messages"]) > 1:
            await may_answer.wait()
        return says("40" if len(body["messages"]) > 1 else "32")

    fault = Fault(1, Kind.KILL_AGENT, 0.0, False, 0.0, 0.0, 0.0, 0.0)
    async with a_pool() as pool, ChatEndpoint(answer) as endpoint:
        playing = asyncio.create_task(play(pool, endpoint, WITH_AGENT))
        injected = await asyncio.to_thread(inject, TestBed(), fault)
        may_answer.set()
        injected.end()
        await asyncio.wait([playing])
    return injected, playing.exception() or playing.result(), endpoint


@pytest.mark.parametrize("inject", [kill_agent, kill_environment_worker])
def test_an_episode_whose_agent_or_worker_is_killed_has_no_outcome(inject: Inject) -> None:
    injected, result, endpoint = asyncio.run(hit(inject))
    assert isinstance(result, EpisodeFailed) and len(endpoint.requests) <= 2
    assert ("the agent ended with -9" if inject is kill_agent else "ended with status -9") in str(result)
    assert not any(str(AGENT) in words_of(child) for child in children_of(psutil.Process(), recursive=True))
    assert "generation-0" in injected.target


def test_a_worker_that_thaws_goes_on() -> None:
    injected, result, _ = asyncio.run(hit(freeze_environment_worker))
    assert isinstance(result, Outcome) and result.reward == 1.0
    assert injected.is_over()


# The checks of groups


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(POLICY / "tokenizer.json"))


def rollout(tokenizer: Tokenizer, texts: Sequence[str], episode: float = 1.0, **changes: Any) -> Rollout:
    """Of an episode that saw these replies, `higher` between them; a stop token ends each text."""
    tokens: list[int] = []
    turns: list[Turn] = []
    mask = b""
    for index, text in enumerate(texts):
        for role, said in (("user", "higher"), ("assistant", text))[index == 0 :]:
            start = len(tokens)
            tokens += [*tokenizer.encode(said, add_special_tokens=False).ids, *TICKET.sampling.stop_token_ids]
            mask += bytes([role == "assistant"]) * (len(tokens) - start)
            turns.append(Turn(role, 0, start, len(tokens), float(index), float(index)))  # type: ignore[arg-type]
    num_sampled = mask.count(1)
    segment = make_segment(
        np.array(tokens, np.int32),
        loss_mask=mask,
        behaviour_logprobs=np.full(num_sampled, -0.5, np.float32),
        version_spans=make_segment(tuple(range(num_sampled))).version_spans,
    )
    metrics = {"episode": episode, "replies": float(len(texts)), "digest": digest(texts), "is_agent": 1.0}
    return msgspec.structs.replace(Rollout([segment], 1.0, "stop", turns=turns, metrics=metrics), **changes)


def group(*rollouts: Rollout, ticket: Ticket = TICKET) -> bytes:
    whole = msgspec.structs.replace(ticket, num_completions=len(rollouts))
    return encode(Group(whole, list(rollouts), "r", Timings(1.0, 2.0, 3.0)))


def found(tokenizer: Tokenizer, *payloads: bytes) -> list[str]:
    checks = GroupChecks(tokenizer)
    for number, payload in enumerate(payloads):
        checks.take(f"{number}-0", f"0-{number}", payload)
    return [text for _, text in checks.violations]


def test_groups_of_what_their_episodes_saw_are_sound(tokenizer: Tokenizer) -> None:
    checks = GroupChecks(tokenizer)
    late = rollout(tokenizer, ["5<|user|>5"], 3.0, failed_episodes=1)
    checks.take("1-0", "0-0", group(rollout(tokenizer, ["32", "48"], 1.0), rollout(tokenizer, ["32"], 2.0)))
    checks.take("2-0", "0-1", group(late))
    assert checks.violations == []
    counts = checks.counts
    assert (counts.groups, counts.rollouts, counts.turns, counts.with_agent, counts.after_failed_episodes) == (
        2,
        3,
        4,
        3,
        1,
    )


def test_a_rollout_of_another_episode_than_its_reward_is_found(tokenizer: Tokenizer) -> None:
    saw = rollout(tokenizer, ["32", "48"])
    for other in (["32"], ["32", "40"], ["48", "32"], ["32", "48", "40"]):
        [text] = found(tokenizer, group(rollout(tokenizer, other, metrics=saw.metrics)))
        assert f"the {len(other)} replies {other}, its episode saw 2.0" in text
    assert "saw None" in found(tokenizer, group(rollout(tokenizer, ["32"], metrics={})))[0]


def test_an_episode_in_two_rollouts_is_found(tokenizer: Tokenizer) -> None:
    one = rollout(tokenizer, ["32"])
    assert found(tokenizer, group(one, one)) == ["rollout 1 is of the episode of rollout 0-0 0"]
    assert found(tokenizer, group(one), group(one, ticket=make_ticket("0-1", limits=LIMITS))) == [
        "rollout 0 is of the episode of rollout 0-0 0"
    ]


def test_a_group_that_is_incomplete_or_whose_turns_are_not_what_was_sampled_is_found(tokenizer: Tokenizer) -> None:
    sound = rollout(tokenizer, ["32", "48"])
    short = encode(Group(msgspec.structs.replace(TICKET, num_completions=2), [sound], "r", Timings(1.0, 2.0, 3.0)))
    unsampled = group(msgspec.structs.replace(sound, turns=sound.turns[:-1]))
    assert "1 rollouts, expected 2" in found(tokenizer, short)[0]
    assert "the replies are not the sampled tokens" in found(tokenizer, unsampled)[0]


def test_two_groups_of_one_ticket_are_found(tokenizer: Tokenizer) -> None:
    checks = GroupChecks()
    for entry_id, episode in (("1-0", 1.0), ("2-0", 2.0)):
        checks.take(entry_id, "0-0", group(rollout(tokenizer, ["32"], episode)))
    assert [text for _, text in checks.violations] == ["committed twice: as 1-0 and as 2-0"]
