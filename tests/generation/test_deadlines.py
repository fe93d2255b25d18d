"""A ticket's deadline is about progress: what else the engine answers, and how long a completion may be."""

import asyncio

import pytest

from headrace.generation.engine.deadlines import MAX_ALLOWANCES, TOKENS_PER_TIMEOUT, CompletionDeadlines
from tests.support.guard import GUARD_S

TICK_S = 0.02


async def given_up_after(deadlines: CompletionDeadlines, max_new_tokens: int = 8) -> float:
    """Seconds, of a request that is never answered."""
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    with pytest.raises(TimeoutError):
        async with deadlines.enforce(max_new_tokens):
            await asyncio.Event().wait()
    return loop.time() - began_at


def test_longer_completions_are_given_more_time() -> None:
    deadlines = CompletionDeadlines(600.0)
    assert [deadlines.allowance_s(count) for count in (1, TOKENS_PER_TIMEOUT, 8 * TOKENS_PER_TIMEOUT)] == [
        600.0,
        600.0,
        4800.0,
    ]
    assert asyncio.run(given_up_after(CompletionDeadlines(0.1), 3 * TOKENS_PER_TIMEOUT)) >= 0.3


@pytest.mark.parametrize("is_answered", [True, False])
def test_answers_to_others_begin_it_anew_but_not_for_ever(is_answered: bool) -> None:
    """Another ticket every twentieth of the allowance, answered or failed."""
    allowance_s = 20 * TICK_S

    async def scenario() -> float:
        deadlines = CompletionDeadlines(allowance_s)

        async def others() -> None:
            while True:
                try:
                    async with deadlines.enforce(8):
                        await asyncio.sleep(TICK_S)
                        if not is_answered:
                            raise ConnectionError
                except ConnectionError:
                    pass

        answering = asyncio.create_task(others())
        waited_s = await given_up_after(deadlines)
        answering.cancel()
        return waited_s

    waited_s = asyncio.run(asyncio.wait_for(scenario(), GUARD_S))
    assert waited_s >= MAX_ALLOWANCES * allowance_s if is_answered else allowance_s <= waited_s < 3 * allowance_s
