"""A ticket's deadline depends on progress: on other answers of the engine, and on the length of a completion."""

import asyncio

import pytest

from headrace.generation.engine.deadlines import MAX_ALLOWANCES, TOKENS_PER_TIMEOUT, CompletionDeadlines
from tests.support.virtual_time import run_in_virtual_time

TICK_S = 1.0


async def given_up_after(deadlines: CompletionDeadlines, max_new_tokens: int = 8) -> float:
    """Seconds until a request that is never answered times out."""
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
    waited_s = run_in_virtual_time(given_up_after(CompletionDeadlines(600.0), 3 * TOKENS_PER_TIMEOUT))
    assert waited_s == pytest.approx(1800.0)


@pytest.mark.parametrize("is_answered", [True, False])
def test_answers_to_other_tickets_restart_the_deadline_up_to_a_limit(is_answered: bool) -> None:
    """Another ticket is answered, or fails, every twentieth of the allowance."""
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

    waited_s = run_in_virtual_time(scenario())
    assert waited_s == pytest.approx(MAX_ALLOWANCES * allowance_s if is_answered else allowance_s)
