"""Environment workers: whatever an episode does, only it fails, with one line."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.common.config import TaskConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.common.tasks import Outcome
from headrace.common.wire import Limits, Sampling, Ticket
from headrace.generation.environments import process
from headrace.generation.environments.messages import EpisodeStart
from headrace.generation.environments.pool import EnvironmentPool
from headrace.generation.environments.process import EpisodeFailed, EpisodeInterrupted
from headrace.generation.workers.process import TaskError
from tests.support.chat_endpoint import ChatEndpoint, at_limit, says
from tests.support.guard import GUARD_S

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT, PLAIN = (f"tests.support.faulty_environments:{name}" for name in ("Environment", "Plain"))


def episode(do: str, place: int = 0, base_url: str = "http://127.0.0.1:1/v1") -> EpisodeStart:
    ticket = Ticket(
        id="ticket-7",
        kind="train",
        prompt_tokens=[1],
        messages=[{"role": "user", "content": "2 + 2?"}],
        reference={"do": do},
        num_completions=1,
        sampling=Sampling(temperature=1.0, max_new_tokens=8, stop_token_ids=[]),
        min_weight_version=0,
        limits=Limits(max_turns=4, max_tokens=32, max_context_tokens=64, max_segments=2),
    )
    return EpisodeStart(ticket, place, 1, 42, base_url, "secret", "policy")


class Pool:
    def __init__(self, pool: EnvironmentPool) -> None:
        self.pool = pool

    async def play(self, do: str, idle_s: Callable[[], float] = lambda: 0.0, **settings: Any) -> Outcome:
        return await self.pool.run(episode(do, **settings), idle_s)

    async def pid(self) -> float:
        return (await self.play("pid")).reward


@asynccontextmanager
async def running_pool(task: str = ENVIRONMENT, task_settings: Any = None, **settings: Any) -> AsyncIterator[Pool]:
    pool = EnvironmentPool(
        TaskConfig(name=task, settings=task_settings or {}), EnvironmentConfig(**{"memory_bytes": 1 << 30, **settings})
    )
    async with asyncio.timeout(GUARD_S):
        await pool.start()
        try:
            yield Pool(pool)
        finally:
            await pool.close()


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_one_worker_plays_many_episodes_at_a_time() -> None:
    """None of them ends before all have begun."""

    async def scenario() -> None:
        async with running_pool() as pool:
            outcomes = await asyncio.gather(*(pool.play("meet 20", place=place) for place in range(20)))
            assert outcomes == [Outcome(1.0)] * 20
            assert len(children()) - len(before) == 1

    before = children()
    asyncio.run(scenario())
    assert children() == before


def test_an_episode_beyond_the_room_waits() -> None:
    async def scenario() -> None:
        async with running_pool(episodes_per_worker=2) as pool:
            blocking = [asyncio.create_task(pool.play("wait")) for _ in range(2)]
            third = asyncio.create_task(pool.play("3"))
            await asyncio.wait([third], timeout=0.2)
            assert not third.done() and pool.pool.num_playing == 2
            blocking[0].cancel()
            assert await third == Outcome(3.0)
            blocking[1].cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize("task", [ENVIRONMENT, PLAIN])
def test_an_episode_talks_with_the_endpoint_that_it_is_given(task: str) -> None:
    async def scenario() -> None:
        async with ChatEndpoint(lambda body: says("4")) as endpoint, running_pool(task) as pool:
            outcome = await pool.play("reply", base_url=endpoint.base_url)
            metrics = {"seed": 42.0, "attempt": 1.0} if task == ENVIRONMENT else {}
            assert outcome == Outcome(4.0, metrics)
            [request] = endpoint.requests
            assert request.headers["Authorization"] == "Bearer secret"
            assert request.body == {"model": "policy", "messages": [{"role": "user", "content": "2 + 2?"}]}

    asyncio.run(scenario())


def test_a_plain_rollout_runs_in_a_thread() -> None:
    async def scenario() -> None:
        async with running_pool(PLAIN) as pool:
            assert await pool.play("thread") == Outcome(1.0)

    asyncio.run(scenario())


def test_a_worker_inherits_neither_the_token_nor_redis_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADRACE_TOKEN", "HEADRACE_REDIS_URL", "REDIS_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("SERVICE_KEY", "what a task may need")

    async def scenario() -> None:
        async with running_pool() as pool:
            assert await pool.play(f"spy {tmp_path / 'found'}") == Outcome(1.0)

    asyncio.run(scenario())
    found = (tmp_path / "found").read_text()
    assert "SERVICE_KEY=what a task may need" in found and "secret" not in found


FAULTS = {
    "raise": "ValueError: .*is no text.*faulty_environments.py:",
    "return nan": "expected a finite number for a reward, got nan",
    "return none": "expected a finite number for a reward, got None",
    "return text": "expected a finite number for a reward, got '1.0'",
    "return metric": "expected a finite number for the metric 'turns', got inf",
    "eat": "MemoryError",
    "leave": "SystemExit: enough",
}


@pytest.mark.parametrize("task", [ENVIRONMENT, PLAIN])
def test_what_an_episode_raises_or_returns_fails_it_alone(task: str) -> None:
    async def scenario() -> None:
        async with running_pool(task) as pool:
            pid = await pool.pid()
            for do, reason in FAULTS.items():
                other = asyncio.create_task(pool.play("2"))
                with pytest.raises(EpisodeFailed, match=f"(?s){reason}") as caught:
                    await pool.play(do)
                assert "\n" not in str(caught.value)
                assert await other == Outcome(2.0)
                assert await pool.pid() == pid, f"the worker of {do!r} was given up"

    asyncio.run(scenario())


def test_what_an_episode_prints_or_reads_reaches_nobody() -> None:
    async def scenario() -> None:
        async with running_pool() as pool:
            assert await pool.play("print") == Outcome(0.0)
            assert await pool.play("4") == Outcome(4.0)

    asyncio.run(scenario())


def test_what_an_episode_forks_cannot_speak_for_its_worker() -> None:
    """And it is gone with it."""

    async def scenario() -> None:
        async with running_pool() as pool:
            pid = await pool.pid()
            assert await pool.play("fork") == Outcome(1.0)
            assert await pool.pid() == pid

    before = children()
    asyncio.run(scenario())
    assert children() == before


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled episode is given little time."""
    monkeypatch.setattr(process, "CANCEL_S", 0.3)


def test_an_episode_past_its_deadline_fails_alone(soon: None, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_pool(episode_deadline_s=0.2) as pool:
            other = asyncio.create_task(pool.play("wait"))
            with pytest.raises(EpisodeFailed, match=r"did not end within environment\.episode_deadline_s 0\.2"):
                await pool.play(f"clean_up {tmp_path / 'cleaned'}")
            assert (tmp_path / "cleaned").read_text() == "clean"
            with pytest.raises(EpisodeFailed):
                await other
            assert await pool.play("1") == Outcome(1.0)

    asyncio.run(scenario())


def test_an_environment_that_keeps_the_turn_too_long_fails() -> None:
    idle = {"s": 0.0}

    async def scenario() -> None:
        async with running_pool(turn_deadline_s=0.2) as pool:
            playing = asyncio.create_task(pool.play("wait", lambda: idle["s"]))
            await asyncio.wait([playing], timeout=0.5)
            assert not playing.done(), "a request is under way"
            idle["s"] = 600.0
            with pytest.raises(
                EpisodeFailed, match=r"neither asked for a reply nor ended within environment\.turn_deadline_s 0\.2"
            ):
                await playing

    asyncio.run(scenario())


def test_an_episode_that_does_not_end_when_cancelled_costs_its_worker_and_others_are_interrupted(soon: None) -> None:
    async def scenario() -> None:
        async with running_pool(turn_deadline_s=0.2) as pool:
            pid = await pool.pid()
            others = [asyncio.create_task(pool.play("wait")) for _ in range(3)]
            with pytest.raises(EpisodeFailed, match="turn_deadline_s"):
                await pool.play("stubborn", lambda: 600.0)
            for other in others:
                with pytest.raises(EpisodeInterrupted, match="another episode in its worker did not end") as caught:
                    await other
                assert not caught.value.is_suspect
            assert await pool.pid() != pid

    asyncio.run(scenario())


def test_a_plain_rollout_that_waits_for_nothing_of_ours_is_ended_with_its_worker(soon: None) -> None:
    async def scenario() -> None:
        async with running_pool(PLAIN, turn_deadline_s=0.2) as pool:
            with pytest.raises(EpisodeFailed, match="turn_deadline_s"):
                await pool.play("hang", lambda: 600.0)
            assert await pool.play("1") == Outcome(1.0)

    asyncio.run(scenario())


def test_a_plain_rollout_that_asks_is_ended_at_its_next_request() -> None:
    """Its worker lives on."""

    async def scenario() -> None:
        async with (
            ChatEndpoint(lambda body: at_limit("max_turns")) as endpoint,
            running_pool(PLAIN, turn_deadline_s=0.2) as pool,
        ):
            pid = await pool.pid()
            with pytest.raises(EpisodeFailed, match="turn_deadline_s"):
                await pool.play("ask", lambda: 600.0, base_url=endpoint.base_url)
            assert await pool.pid() == pid

    asyncio.run(scenario())


def test_whoever_blocks_the_loop_is_found_by_playing_all_alone(soon: None) -> None:
    """The deadline that passes first may be another's."""

    async def scenario() -> None:
        async with running_pool(turn_deadline_s=0.2) as pool:
            idle = {"s": 0.0}
            orders = ["wait", "hang", "wait"]
            together = [asyncio.create_task(pool.play(do, lambda: idle["s"])) for do in orders]
            await asyncio.wait(together, timeout=0.3)
            idle["s"] = 600.0
            for playing in together:
                with pytest.raises(EpisodeInterrupted, match="event loop was blocked") as caught:
                    await playing
                assert caught.value.is_suspect
            with pytest.raises(EpisodeFailed, match="turn_deadline_s"):
                await pool.pool.run(episode("hang"), lambda: 600.0, is_suspect=True)
            assert await pool.pool.run(episode("1"), lambda: 0.0, is_suspect=True) == Outcome(1.0)

    before = children()
    asyncio.run(scenario())
    assert children() == before


def test_whoever_ends_the_process_is_found_by_playing_all_alone() -> None:
    async def scenario() -> None:
        async with running_pool() as pool:
            waiting = asyncio.create_task(pool.play("wait"))
            while pool.pool.num_playing == 0:
                await asyncio.sleep(0.01)
            for playing in (pool.play("exit"), waiting):
                with pytest.raises(EpisodeInterrupted, match="its worker's process ended with status 7") as caught:
                    await playing
                assert caught.value.is_suspect
            with pytest.raises(EpisodeFailed, match="its worker's process ended with status 7"):
                await pool.pool.run(episode("exit"), lambda: 0.0, is_suspect=True)
            assert await pool.play("5") == Outcome(5.0)

    asyncio.run(scenario())


def test_children_of_a_killed_worker_are_killed_with_it(soon: None, tmp_path: Path) -> None:
    fifo = tmp_path / "held_by_child"
    os.mkfifo(fifo)

    async def scenario() -> None:
        async with running_pool(turn_deadline_s=0.2) as pool:
            worker = psutil.Process(int(await pool.pid()))

            def has_child() -> bool:
                return worker.is_running() and bool(worker.children())

            end_of_file = asyncio.create_task(asyncio.to_thread(fifo.read_bytes))
            with pytest.raises(EpisodeFailed, match="turn_deadline_s"):
                await pool.play(f"hang_with_child {fifo}", lambda: 600.0 * has_child())
            assert await end_of_file == b""

    asyncio.run(scenario())


def test_a_cancelled_caller_does_not_wait_for_the_episode_and_frees_its_place(soon: None) -> None:
    async def scenario() -> None:
        async with running_pool(episodes_per_worker=1) as pool:
            pid = await pool.pid()
            for do in ("wait", "stubborn"):
                playing = asyncio.create_task(pool.play(do))
                while pool.pool.num_playing == 0:
                    await asyncio.sleep(0.01)
                playing.cancel()
                await asyncio.wait([playing], timeout=0.1)
                assert playing.cancelled()
                assert (await pool.pid() == pid) is (do == "wait")

    asyncio.run(scenario())


def test_a_worker_that_died_while_idle_fails_no_episode() -> None:
    async def scenario() -> None:
        async with running_pool() as pool:
            pid = int(await pool.pid())
            psutil.Process(pid).kill()
            while psutil.pid_exists(pid):
                await asyncio.sleep(0.01)
            assert await pool.play("8") == Outcome(8.0)

    asyncio.run(scenario())


def test_a_context_manager_is_entered_once_per_worker_and_left_at_the_end(tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    async def scenario() -> None:
        async with running_pool(
            "tests.support.faulty_environments:Entered", {"path": str(notes)}, workers=2, episodes_per_worker=2
        ) as pool:
            assert notes.read_text() == "entered\n" * 2
            assert await asyncio.gather(*(pool.play("1") for _ in range(4))) == [Outcome(1.0)] * 4
            assert notes.read_text() == "entered\n" * 2

    asyncio.run(scenario())
    assert notes.read_text() == "entered\n" * 2 + "left\n" * 2


def test_closing_ends_every_process_and_every_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_pool(workers=2, episodes_per_worker=2) as pool:
            orders = [f"clean_up {tmp_path / 'cleaned'}", *["wait"] * 6]
            playing = [asyncio.create_task(pool.play(do)) for do in orders]
            while pool.pool.num_playing < 4:
                await asyncio.sleep(0.01)
            await asyncio.wait(playing, timeout=0.1)
        outcomes = await asyncio.gather(*playing, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EpisodeInterrupted] * 7

    before = children()
    asyncio.run(scenario())
    assert children() == before
    assert (tmp_path / "cleaned").read_text() == "clean"


@pytest.mark.parametrize(
    ("task", "reason"),
    [("Unloadable", "data are lost"), ("Closed", "environment is down"), ("Missing", "cannot be imported")],
)
def test_a_task_that_cannot_be_loaded_or_entered_fails_the_start(task: str, reason: str) -> None:
    async def scenario() -> None:
        with pytest.raises(TaskError, match=reason):
            async with running_pool(f"tests.support.faulty_environments:{task}", workers=2):
                pass

    before = children()
    asyncio.run(scenario())
    assert children() == before


def test_a_parent_killed_by_sigkill_leaves_no_worker() -> None:
    program = """
import asyncio
from headrace.common.config import TaskConfig
from headrace.common.config.environment import EnvironmentConfig
from headrace.generation.environments.pool import EnvironmentPool
from tests.generation.test_environment_pool import ENVIRONMENT, episode

async def run():
    pool = EnvironmentPool(TaskConfig(name=ENVIRONMENT), EnvironmentConfig())
    await pool.start()
    print(int((await pool.run(episode("pid"), lambda: 0.0)).reward), flush=True)
    await pool.run(episode("hang"), lambda: 0.0)

asyncio.run(run())
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert parent.stdout is not None
    assert psutil.Process(int(parent.stdout.readline())).ppid() == parent.pid
    parent.kill()
    parent.communicate(timeout=GUARD_S)  # returns at the end of stderr, which the worker holds open until it ends
