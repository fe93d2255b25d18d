"""The reward pool: whatever a reward does, only its own group fails."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from headrace.common.tasks import Outcome
from headrace.common.wire import Sampling, Ticket
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.rewards.process import RewardError, RewardWorker
from headrace.generation.rewards.worker import CompletionScore, ScoreRequest
from headrace.generation.workers.process import TaskError
from tests.support.guard import GUARD_S

REPOSITORY = Path(__file__).parents[2]
TICKET = Ticket(
    id="ticket-7",
    kind="train",
    prompt_tokens=[1],
    messages=[{"role": "user", "content": "2 + 2?"}],
    reference={"answer": "4"},
    num_completions=1,
    sampling=Sampling(temperature=1.0, max_new_tokens=8, stop_token_ids=[]),
    min_weight_version=0,
)


@asynccontextmanager
async def running_pool(task: str = "tests.support.faulty_tasks:Obedient", **settings: Any) -> AsyncIterator[RewardPool]:
    options: dict[str, Any] = {"num_workers": 1, "deadline_s": GUARD_S, "memory_bytes": 1 << 30} | settings
    pool = RewardPool(task, options.pop("task_settings", {}), **options)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def rewards(pool: RewardPool, completions: list[str]) -> list[float]:
    return [outcome.reward for outcome in await pool.score(TICKET, completions)]


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_rewards_come_in_order_and_settings_reach_the_task() -> None:
    async def scenario() -> None:
        async with running_pool(num_workers=2, task_settings={"factor": 0.5}) as pool:
            groups = [[str(10 * group + member) for member in range(4)] for group in range(10)]
            scored = await asyncio.gather(*(rewards(pool, group) for group in groups))
            assert scored == [[0.5 * float(completion) for completion in group] for group in groups]
            assert await rewards(pool, []) == []

    asyncio.run(scenario())


def test_a_task_may_lie_wherever_the_parent_can_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far_away.py").write_text("from tests.support.faulty_tasks import Obedient")
    monkeypatch.syspath_prepend(tmp_path)

    async def scenario() -> None:
        async with running_pool("far_away:Obedient") as pool:
            assert await rewards(pool, ["2"]) == [2.0]

    asyncio.run(scenario())


def test_a_worker_inherits_neither_the_token_nor_redis_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADRACE_TOKEN", "HEADRACE_REDIS_URL", "REDIS_PASSWORD"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("JUDGE_API_KEY", "what a task may need")
    with (tmp_path / "token").open("w") as held:
        os.set_inheritable(held.fileno(), True)

        async def scenario() -> None:
            async with running_pool() as pool:
                assert await rewards(pool, [f"spy {tmp_path / 'found'}"]) == [1.0]

        asyncio.run(scenario())
    found = (tmp_path / "found").read_text()
    assert "JUDGE_API_KEY=what a task may need" in found and "descriptor socket:" in found
    assert "secret" not in found
    assert str(tmp_path / "token") not in found


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.generation.rewards.pool.RETRY_PAUSES_S", (0.0, 0.0))


def test_a_reward_that_raises_or_is_not_a_number_fails_its_group_only(no_pauses: None) -> None:
    faults = {
        "raise": "completion 2 of 3: ValueError: .*is no text.*faulty_tasks.py:",
        "return nan": "completion 2 of 3: expected a finite number.*nan",
        "return inf": "finite number.*inf",
        "return text": "finite number.*'1.0'",
        "return none": "finite number.*None",
        "return np.nan": "finite number.*nan",
        "return complex": "finite number.*1j",
        "return array": "ValueError: can only convert an array of size 1",
        "fail 3": "not yet 3",
        "\ud800": "UnicodeEncodeError",
    }

    async def scenario() -> None:
        async with running_pool() as pool:
            [pid] = await rewards(pool, ["pid"])
            for completion, reason in faults.items():
                with pytest.raises(RewardError, match=f"(?s)ticket-7: .*{reason}") as caught:
                    await rewards(pool, ["1", completion, "2"])
                if completion != "\ud800":
                    assert caught.value.completions == [completion]
                assert pool.problem == str(caught.value)
                assert await rewards(pool, ["pid"]) == [pid], f"the worker of {completion!r} was given up"
                assert pool.problem == ""

    asyncio.run(scenario())


def test_a_reward_may_come_with_metrics(no_pauses: None) -> None:
    faults = {
        "outcome inf": "expected a finite number for the metric 'length', got inf",
        "outcome name": "a metric is named 'two words', expected 1 to 100 printable characters without spaces",
        "outcome many": "expected metrics as a dict of at most 64 numbers, got 65 of them",
        "outcome list": "expected metrics as a dict of at most 64 numbers, got list",
        "outcome nan": "expected a finite number for a reward, got nan",
    }

    async def scenario() -> None:
        async with running_pool() as pool:
            outcomes = await pool.score(TICKET, ["outcome", "2"])
            assert outcomes == [Outcome(1.0, {"length": 3.0, "exact": 1.0}), Outcome(2.0)]
            for completion, reason in faults.items():
                with pytest.raises(RewardError, match=f"completion 1 of 1: .*{reason}"):
                    await pool.score(TICKET, [completion])

    asyncio.run(scenario())


def test_a_task_with_rollout_leaves_no_reward_worker() -> None:
    async def scenario() -> None:
        pool = RewardPool(
            "tests.support.faulty_environments:Environment", {}, num_workers=2, deadline_s=GUARD_S, memory_bytes=1 << 30
        )
        assert not await pool.start()
        assert children() == present

    present = children()
    asyncio.run(scenario())


def test_only_the_failed_completions_are_scored_again(no_pauses: None) -> None:
    async def scenario() -> None:
        async with running_pool() as pool:
            completions = ["fail 0 a", "fail 2 b", "7", "fail 1 c", "fail 0 a"]
            assert await rewards(pool, completions) == [1.0, 3.0, 7.0, 2.0, 2.0]
            assert pool.problem == ""

    asyncio.run(scenario())


def test_numpy_numbers_are_valid_rewards() -> None:
    async def scenario() -> None:
        async with running_pool() as pool:
            names = ["true", "np.true", "np.float", "np.int", "0d"]
            assert await rewards(pool, [f"return {name}" for name in names]) == [1.0, 1.0, 0.5, 3.0, 2.0]

    asyncio.run(scenario())


def test_a_reward_that_ends_its_worker_fails_its_group_only() -> None:
    faults = {"eat": "MemoryError", "exit": "status 7", "leave": "SystemExit: enough", "oom_killed": "status -9"}

    async def scenario() -> None:
        async with running_pool() as pool:
            [pid] = await rewards(pool, ["pid"])
            for completion, reason in faults.items():
                with pytest.raises(RewardError, match=f"(?s)ticket-7: .*{reason}") as caught:
                    await rewards(pool, ["1", completion, "2"])
                assert caught.value.completions == ["1", completion, "2"]
                [next_pid] = await rewards(pool, ["pid"])
                assert next_pid != pid, f"the worker of {completion!r} was used again"
                pid = next_pid

    asyncio.run(scenario())


def test_others_are_scored_while_a_reward_hangs() -> None:
    async def scenario() -> None:
        async with running_pool(num_workers=2) as pool:
            hanging = asyncio.create_task(rewards(pool, ["1", "hang"]))
            scored = await asyncio.gather(*(rewards(pool, [str(number)]) for number in range(50)))
            assert scored == [[float(number)] for number in range(50)]
            assert not hanging.done()
        await asyncio.gather(hanging, return_exceptions=True)

    asyncio.run(scenario())


def test_a_hanging_reward_is_killed_at_its_deadline() -> None:
    async def scenario() -> None:
        async with running_pool(deadline_s=0.2) as pool:
            with pytest.raises(RewardError, match=r"deadline of 0\.2 s"):
                await rewards(pool, ["1", "hang"])

    asyncio.run(scenario())


def test_the_deadline_starts_when_a_worker_gets_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second group waits for the only worker and then gets the whole deadline."""
    seen: list[Any] = []
    score = RewardWorker.score

    async def score_and_note(worker: RewardWorker, request: ScoreRequest) -> list[CompletionScore]:
        seen.append((request.completions, request.deadline_s))
        is_hanging = request.completions == ["hang"]
        try:
            return await score(worker, msgspec.structs.replace(request, deadline_s=0.2) if is_hanging else request)
        finally:
            seen.append("ended")

    monkeypatch.setattr(RewardWorker, "score", score_and_note)

    async def scenario() -> None:
        async with running_pool() as pool:
            groups = (rewards(pool, [completion]) for completion in ("hang", "5"))
            outcomes = await asyncio.gather(*groups, return_exceptions=True)
            assert isinstance(outcomes[0], RewardError) and outcomes[1] == [5.0]

    asyncio.run(scenario())
    assert seen == [(["hang"], GUARD_S), "ended", (["5"], GUARD_S), "ended"]


def test_each_completion_has_the_deadline_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent waits anew for each score: a group may take longer than the deadline of one completion."""
    waited: list[float] = []
    receive = RewardWorker.receive

    async def receive_and_note(worker: RewardWorker, kind: Any, deadline_s: float, late_s: float = 0.0) -> Any:
        waited.append(deadline_s)
        return await receive(worker, kind, deadline_s, late_s)

    async def scenario() -> None:
        async with running_pool() as pool:
            monkeypatch.setattr(RewardWorker, "receive", receive_and_note)
            assert await rewards(pool, ["1", "2", "3"]) == [1.0, 2.0, 3.0]

    asyncio.run(scenario())
    assert waited == [GUARD_S] * 3


AWAITED = "tests.support.faulty_tasks:Awaited"


def test_an_asynchronous_reward_scores_all_completions_of_a_group_at_once() -> None:
    """None of them returns before all were begun."""

    async def scenario() -> None:
        async with running_pool(AWAITED) as pool:
            assert await rewards(pool, [f"meet {number} of 8" for number in range(8)]) == list(range(8))
            assert await rewards(pool, ["2", "1"]) == [2.0, 1.0], "the same loop serves the next group"

    asyncio.run(scenario())


def test_an_asynchronous_reward_past_its_deadline_fails_its_group_and_not_the_worker(no_pauses: None) -> None:
    """The other completions keep their rewards: only the late one is scored again."""

    async def scenario() -> None:
        async with running_pool(AWAITED, deadline_s=0.2) as pool:
            with pytest.raises(
                RewardError, match=r"completion 2 of 2: no reward within the deadline of 0\.2 s"
            ) as caught:
                await rewards(pool, ["1", "wait"])
            assert caught.value.completions == ["wait"]
            [before], [after] = [pool._running, await rewards(pool, ["pid"])]
            assert before.process.pid == after

    asyncio.run(scenario())


def test_what_an_asynchronous_reward_raises_fails_its_group_only(no_pauses: None) -> None:
    faults = {
        "raise": "completion 2 of 3: ValueError: .*is no text.*faulty_tasks.py:",
        "timeout": "TimeoutError: the judge",
        "return nan": "finite number.*nan",
        "leave": "SystemExit: enough",
        "cancel": "CancelledError",
    }

    async def scenario() -> None:
        async with running_pool(AWAITED) as pool:
            for completion, reason in faults.items():
                with pytest.raises(RewardError, match=f"(?s)ticket-7: .*{reason}"):
                    await rewards(pool, ["1", completion, "2"])
                assert await rewards(pool, ["3"]) == [3.0]

    asyncio.run(scenario())


def test_an_asynchronous_reward_that_blocks_its_loop_is_killed() -> None:
    async def scenario() -> None:
        async with running_pool(AWAITED, deadline_s=0.2) as pool:
            with pytest.raises(RewardError, match=r"no answer within the deadline of 0\.2 s"):
                await rewards(pool, ["1", "hang"])
            assert await rewards(pool, ["3"]) == [3.0], "another worker has its place"

    asyncio.run(scenario())


def test_a_reward_can_neither_write_to_nor_read_from_the_connection() -> None:
    async def scenario() -> None:
        async with running_pool() as pool:
            assert await rewards(pool, ["print", "3"]) == [0.0, 3.0]
            assert await rewards(pool, ["4"]) == [4.0]

    asyncio.run(scenario())


def test_a_child_of_a_hanging_reward_is_killed_with_it(tmp_path: Path) -> None:
    fifo = tmp_path / "held_by_child"
    os.mkfifo(fifo)

    async def scenario() -> None:
        async with running_pool() as pool:
            end_of_file = asyncio.create_task(asyncio.to_thread(fifo.read_bytes))
            [worker] = pool._running
            scoring = asyncio.create_task(rewards(pool, [f"hang_with_child {fifo}"]))
            while not psutil.Process(worker.process.pid).children():
                await asyncio.sleep(0.01)
            scoring.cancel()
            assert await asyncio.wait_for(end_of_file, GUARD_S) == b""

    asyncio.run(scenario())


def test_a_cancelled_caller_leaves_a_pool_that_works() -> None:
    async def scenario() -> None:
        async with running_pool() as pool:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(rewards(pool, ["hang"]), timeout=0.2)
            assert await rewards(pool, ["6"]) == [6.0]

    asyncio.run(scenario())


def test_a_worker_that_died_while_idle_fails_no_group() -> None:
    async def scenario() -> None:
        async with running_pool() as pool:
            [pid] = await rewards(pool, ["pid"])
            [worker] = pool._running
            psutil.Process(int(pid)).kill()
            await asyncio.to_thread(worker.process.wait)
            assert await rewards(pool, ["8"]) == [8.0]

    asyncio.run(scenario())


def test_closing_ends_every_process_and_every_wait() -> None:
    async def scenario() -> None:
        async with running_pool(num_workers=2) as pool:
            assert len(children()) >= 2
            groups = [asyncio.create_task(rewards(pool, ["hang"])) for _ in range(5)]
            await asyncio.wait(groups, timeout=0.2)
        outcomes = await asyncio.gather(*groups, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RewardError] * 5

    present = children()
    asyncio.run(scenario())
    assert children() == present


@pytest.mark.parametrize(
    ("task", "reason"), [("Unloadable", "rules are lost"), ("Greedy", "MemoryError"), ("Missing", "cannot be imported")]
)
def test_a_task_that_cannot_be_loaded_fails_the_start(task: str, reason: str) -> None:
    async def scenario() -> None:
        with pytest.raises(TaskError, match=reason):
            async with running_pool(f"tests.support.faulty_tasks:{task}", num_workers=2):
                pass

    present = children()
    asyncio.run(scenario())
    assert children() == present


def test_a_parent_killed_by_sigkill_leaves_no_worker() -> None:
    program = """
import asyncio
from headrace.generation.rewards.pool import RewardPool
from tests.generation.test_reward_pool import TICKET

async def run():
    pool = RewardPool("tests.support.faulty_tasks:Obedient", {}, num_workers=2, deadline_s=600, memory_bytes=2 << 30)
    await pool.start()
    await pool.score(TICKET, ["hang"])

asyncio.run(run())
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    assert parent.stderr is not None
    assert any(line == b"hanging\n" for line in parent.stderr), "the hanging reward never ran"
    assert len(psutil.Process(parent.pid).children()) == 2
    parent.kill()
    parent.communicate(timeout=GUARD_S)  # returns at the end of stderr, which each worker holds open until it ends
