"""A judge's scores as rewards: from a scripted endpoint, and from a real second SGLang."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from headrace.common.tasks import BadRow, Prompt, load_task
from headrace.common.tasks.judged import RUBRIC
from headrace.common.wire import Ticket
from headrace.generation.engine.client import Engine
from headrace.generation.engine.server import EngineServer
from headrace.generation.rewards.pool import RewardPool
from headrace.generation.rewards.process import RewardError
from tests.support.factories import make_ticket
from tests.support.fake_sglang import FakeSglang
from tests.support.guard import GUARD_S

CHAT = "/v1/chat/completions"
ROWS = [{"question": f"What is {number} + 1?", "hint": str(number + 1)} for number in range(12)]


@pytest.fixture
def settings(tmp_path: Path, fake: FakeSglang) -> dict[str, Any]:
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    paths = {f"{name}_path": str(tmp_path / f"{name}.jsonl") for name in ("train", "held_out")}
    return {**paths, "judge_url": fake.url}


def judging(fake: FakeSglang, text: str | None) -> None:
    fake.replies[CHAT] = 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def ticket_of(row: dict[str, Any]) -> Ticket:
    return make_ticket(messages=[{"role": "user", "content": row["question"]}], reference=row)


def scored(settings: dict[str, Any], completions: list[str], **options: Any) -> list[float]:
    """By a reward worker, as in a replica."""

    async def scenario() -> list[float]:
        pool = RewardPool("judged", settings, num_workers=1, memory_bytes=4 << 30, **{"deadline_s": GUARD_S, **options})
        await pool.start()
        try:
            return [outcome.reward for outcome in await pool.score(ticket_of(ROWS[1]), completions)]
        finally:
            await pool.close()

    return asyncio.run(scenario())


def test_a_judges_score_is_a_reward_from_0_to_1(settings: dict[str, Any], fake: FakeSglang) -> None:
    judging(fake, "Score: 3 would be for a guess. It is right.\nScore: 9")
    assert scored(settings, ["It is 2.", "{question} 2"]) == [0.9, 0.9]
    bodies = [body for path, body in fake.calls if path == CHAT]
    assert {body["messages"][0]["content"] for body in bodies} == {
        RUBRIC.format(question="What is 1 + 1?", completion=completion) for completion in ("It is 2.", "{question} 2")
    }
    assert {(body["model"], body["temperature"]) for body in bodies} == {("default", 0.0)}


@pytest.mark.parametrize("text", ["I like it.", "Score: 11", "", None])
def test_a_reply_without_a_score_is_no_reward(
    text: str | None, settings: dict[str, Any], fake: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.generation.rewards.pool.RETRY_PAUSES_S", (0.0, 0.0))
    judging(fake, text)
    with pytest.raises(RewardError, match="expected a score from 0 to 10 of the judge"):
        scored(settings, ["2"])
    assert [path for path, _ in fake.calls].count(CHAT) == 3, "it is asked again"


def test_a_judge_that_fails_or_is_late_fails_the_group(
    settings: dict[str, Any], fake: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.generation.rewards.pool.RETRY_PAUSES_S", (0.0, 0.0))
    fake.replies[CHAT] = 503, {"error": "overloaded"}
    with pytest.raises(RewardError, match="HTTPStatusError: Server error '503"):
        scored(settings, ["2"])
    fake.hanging.add(CHAT)
    with pytest.raises(RewardError, match=r"no reward within the deadline of 0\.3 s"):
        scored(settings, ["2"], deadline_s=0.3)


def test_rows_become_prompts_and_bad_ones_are_named(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "Why?"}\n{"question": 7}\nno JSON\n{"question": "How?"}')
    task = load_task("judged", settings)
    found = list(task.prompts("train", seed=1, epoch=0))
    assert {prompt.messages[0]["content"] for prompt in found if isinstance(prompt, Prompt)} == {"Why?", "How?"}
    reasons = sorted(row.reason for row in found if isinstance(row, BadRow))
    assert "line 2: expected an object with a text 'question'" in reasons[0] and "line 3: Expecting value" in reasons[1]
    assert found == list(task.prompts("train", seed=1, epoch=0)) != list(task.prompts("train", seed=2, epoch=0))
    named = load_task("judged", settings | {"rubric": "{completion} for {question} by {hint}"})
    assert all(isinstance(row, Prompt) for row in named.prompts("held_out", seed=0, epoch=0))
    lacking = [row.reason for row in named.prompts("train", seed=0, epoch=0) if isinstance(row, BadRow)]
    assert any("the rubric names ['hint'], which the row lacks" in reason for reason in lacking)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rubric": "good?"}, "{completion} in the rubric"),
        ({"rubric": "{completion"}, "score_pattern"),
        ({"score_pattern": "("}, "score_pattern"),
        ({"score_pattern": "9"}, "expected a group for the score"),
        ({"max_score": 0}, "max_score 0: expected a number above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_task("judged", settings | wrong)
    assert text in str(raised.value)


def test_a_real_engine_judges(settings: dict[str, Any], engine_server: EngineServer, demo_policy: Path) -> None:
    """The tiny policy answers the question of the rubric with a number of its own, which serves as the score."""

    async def serve_the_tiny_policy() -> None:
        engine = Engine(engine_server.url)
        try:
            await engine.swap(demo_policy, (await engine.weight_version() or 0) + 1)
        finally:
            await engine.aclose()

    asyncio.run(serve_the_tiny_policy())
    real = settings | {
        "judge_url": engine_server.url,
        "rubric": "Ann has 3 apples and buys 4 apples. How many apples does Ann have now?{completion:.0}",
        "score_pattern": r"(\d+)",
        "max_score": 1e6,
        "max_tokens": 40,
    }
    rewards = scored(real, ["a", "b", "c", "d"])
    assert len(rewards) == 4 and all(0 <= reward <= 1 for reward in rewards)
