"""The episodes of a ticket, at a real gateway with a model without weights behind it: what fails is done again alone,
and never becomes a reward."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.common.config import TaskConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.wire import Group, Limits, Timings, check_group
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.engine.supervisor import EngineDown
from headrace.generation.environments import episodes, process
from headrace.generation.environments.episodes import Episodes, EpisodesFailed, GroupOfEpisodes
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.environments.process import EpisodeInterrupted
from headrace.generation.environments.seeds import seed_of
from tests.support.episodes import check_exact, episode_ticket
from tests.support.gateways import FakeSampler, a_gateway
from tests.support.guard import GUARD_S

ENVIRONMENT = "tests.support.faulty_environments:Environment"
FAMILY = "qwen2.5"


class Play:
    """Episodes of the tests' environment. `unconfirmed`: the versions of this many groups are never confirmed."""

    def __init__(self, pool: EnvironmentPool, sampler: FakeSampler, made: Callable[..., Episodes]) -> None:
        self.pool = pool
        self.sampler = sampler
        self.is_refuted = False
        self.episodes = made(self._wait_until_confirmed)

    async def group(self, do: str, num_episodes: int = 1, **changes: Any) -> Group:
        ticket = episode_ticket(FAMILY, reference={"do": do}, num_completions=num_episodes, **changes)
        found: GroupOfEpisodes = await self.episodes.run(ticket)
        group = Group(ticket, found.rollouts, "replica", Timings(1.0, 2.0, 3.0), found.prompts)
        check_group(group)
        return group

    async def _wait_until_confirmed(self, turns: Iterable[SampledTurn]) -> None:
        if self.is_refuted:
            raise EngineDown("a swap to [7] has not been confirmed")


@asynccontextmanager
async def playing(**settings: Any) -> AsyncIterator[Play]:
    config = EnvironmentConfig(**{"memory_bytes": 1 << 30, **settings})
    pool = EnvironmentPool(TaskConfig(name=ENVIRONMENT), config)
    async with asyncio.timeout(GUARD_S), a_gateway(FAMILY) as (gateway, sampler):
        await pool.start()
        try:
            yield Play(pool, sampler, lambda confirm: Episodes(pool, gateway.open_episode, confirm, config))
        finally:
            await pool.close()


def play(scenario: Callable[[Play], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with playing(**settings) as found:
            await scenario(found)

    asyncio.run(run())


def test_a_group_has_the_exact_tokens_of_each_of_its_episodes() -> None:
    async def scenario(play: Play) -> None:
        group = await play.group("replies 3")
        check_exact(group, play.sampler.model.asked)
        (rollout,) = group.rollouts
        assert [turn.role for turn in rollout.turns].count("assistant") == 3
        assert (rollout.reward, rollout.failed_episodes, rollout.finish_reason) == (3.0, 0, "stop")
        group = await play.group("replies 2", num_episodes=8)
        assert [rollout.reward for rollout in group.rollouts] == [2.0] * 8
        assert play.episodes.num_ended == {"finished": 9, "failed": 0, "interrupted": 0}

    play(scenario)


def test_an_episode_that_fails_is_done_again_with_the_same_seed() -> None:
    async def scenario(play: Play) -> None:
        play.sampler.says = ["one", "three"]
        group = await play.group("fail 1")
        (rollout,) = group.rollouts
        assert (rollout.failed_episodes, rollout.text) == (1, "three"), "nothing of the failed one is left"
        assert rollout.metrics == {"seed": float(seed_of("0-0", 0)), "length": 5.0}
        check_exact(group, play.sampler.model.asked[1:])

    play(scenario)


def test_seeds_differ_by_ticket_and_place() -> None:
    seeds = {seed_of(ticket_id, place) for ticket_id in ("0-0", "0-01", "0-1") for place in range(20)}
    assert len(seeds) == 60 and max(seeds) < 2**31 and seed_of("0-1", 7) == seed_of("0-1", 7)


def test_after_the_last_attempt_the_ticket_has_failed_and_its_other_episodes_end() -> None:
    async def scenario(play: Play) -> None:
        play.sampler.says = ["first", "second"]
        with pytest.raises(
            EpisodesFailed, match=r"^ticket 0-0: episode 1 of 1: ValueError: not yet at attempt 1 "
        ) as one:
            await play.group("fail 2")
        assert one.value.completions == ["first", "second"] and "\n" not in str(one.value)
        with pytest.raises(EpisodesFailed, match=r"ticket 0-0: episode [12] of 2: ValueError"):
            await play.group("raise", num_episodes=2)
        while play.pool.num_playing:
            await asyncio.sleep(0.01)

    play(scenario)


FAULTS = {
    "raise": "ValueError: .*faulty_environments.py:",
    "return nan": "expected a finite number for a reward, got nan",
    "eat": "MemoryError",
    "leave": "SystemExit: enough",
    "exit": "its worker's process ended with status 7",
    "1": "it ended without a reply of the model: there is nothing to train on",
    "fork": "it ended without a reply of the model",
    "print": "it ended without a reply of the model",
    "wait": "its environment neither asked for a reply nor ended within environment.turn_deadline_s 1",
    "hang": "its environment neither asked for a reply nor ended within environment.turn_deadline_s 1",
    "parallel 100": ".*ChatError: the model's endpoint answered 409: the episode has reached its limit max_",
    "replies 100": ".*ChatError: the model's endpoint answered 409: the episode has reached its limit max_",
}


def test_whatever_an_episode_does_costs_it_alone_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are played meanwhile, in the same worker."""
    monkeypatch.setattr(process, "CANCEL_S", 0.3)

    async def scenario(play: Play) -> None:
        for do, reason in FAULTS.items():
            faulty = asyncio.create_task(play.group(do))
            while not play.pool.num_playing and not faulty.done():
                await asyncio.sleep(0.01)
            other = await play.group("replies 2", id="0-1")
            assert [one.failed_episodes for one in other.rollouts] == [0], do
            with pytest.raises(EpisodesFailed, match=f"^ticket 0-0: episode 1 of 1: {reason}") as caught:
                await faulty
            assert "\n" not in str(caught.value), do

    play(scenario, turn_deadline_s=1.0, episode_attempts=1)


def test_a_request_after_the_end_of_its_episode_is_refused_and_never_recorded(tmp_path: Path) -> None:
    async def scenario(play: Play) -> None:
        group = await play.group(f"late {tmp_path / 'noted'}", limits=Limits(1000, 10**6, 10**6, 1000))
        num_recorded = [turn.role for turn in group.rollouts[0].turns].count("assistant")
        while not (tmp_path / "noted").exists():
            await asyncio.sleep(0.01)
        assert "the model's endpoint answered 409" in (tmp_path / "noted").read_text()
        assert num_recorded <= len(play.sampler.model.asked)

    play(scenario)


def test_a_turn_waits_for_an_engine_that_is_down() -> None:
    async def scenario(play: Play) -> None:
        play.sampler.num_down = 3
        group = await play.group("replies 1")
        assert group.rollouts[0].failed_episodes == 0
        check_exact(group, play.sampler.model.asked)

    play(scenario)


def test_versions_that_are_not_confirmed_interrupt_the_ticket() -> None:
    async def scenario(play: Play) -> None:
        play.is_refuted = True
        with pytest.raises(EngineDown, match=r"a swap to \[7\] has not been confirmed"):
            await play.group("replies 1")

    play(scenario)


def test_an_episode_whose_worker_another_has_ended_is_begun_again_and_has_not_failed() -> None:
    async def scenario(play: Play) -> None:
        play.sampler.may_answer.clear()
        innocent = asyncio.create_task(play.group("replies 2", id="0-1"))
        await play.sampler.has_begun.wait()
        with pytest.raises(EpisodesFailed, match="its worker's process ended with status 7"):
            await play.group("exit")
        play.sampler.may_answer.set()
        (rollout,) = (await innocent).rollouts
        assert rollout.failed_episodes == 0
        assert play.episodes.num_ended == {"finished": 1, "failed": 2, "interrupted": 2}

    play(scenario)


def test_an_episode_that_is_interrupted_again_and_again_interrupts_its_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(play: Play) -> None:
        async def interrupted(*_: Any) -> Any:
            raise EpisodeInterrupted("another episode in its worker did not end")

        monkeypatch.setattr(play.pool, "run", interrupted)
        with pytest.raises(EpisodeInterrupted, match="did not end"):
            await play.group("replies 1")
        assert play.episodes.num_ended["interrupted"] == episodes.MAX_INTERRUPTIONS

    play(scenario)


def test_a_ticket_that_is_cancelled_ends_its_episodes_and_their_turns() -> None:
    async def scenario(play: Play) -> None:
        play.sampler.may_answer.clear()
        running = asyncio.create_task(play.group("replies 2", num_episodes=3))
        while len(play.sampler.requests) < 3:
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running])
        assert play.sampler.num_aborted == 3
        while play.pool.num_playing:
            await asyncio.sleep(0.01)

    play(scenario)


def test_a_ticket_without_limits_is_refused() -> None:
    async def scenario(play: Play) -> None:
        with pytest.raises(EpisodesFailed, match="ticket 0-0 has no limits: it was issued for a task with `reward`"):
            await play.group("replies 1", limits=None)

    play(scenario)
