"""What the gateway asks of the engine, and what it does while the engine is down."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from headrace.common.wire import Sampling
from headrace.generation.engine.completions import SampledTurn, TurnRequest
from headrace.generation.engine.http_calls import EngineError
from headrace.generation.engine.reply_parsing import ParsedReply
from headrace.generation.engine.supervisor import EngineDown
from headrace.generation.gateway.errors import GatewayError

RESEND_PAUSE_S = 0.2
Result = TypeVar("Result")


class Sampler(Protocol):
    """As `EngineSupervisor`. A call that is cancelled ends its request in the engine first."""

    async def sample_turn(self, request: TurnRequest) -> SampledTurn: ...
    async def parse_reply(self, text: str, tools: Sequence[dict[str, Any]], opening: str) -> ParsedReply: ...


async def sample_turn(
    sampler: Sampler, prompt_tokens: Sequence[int], sampling: Sampling, deadline_s: float
) -> SampledTurn:
    """While the engine is down the same tokens are sent again, up to the event loop's time `deadline_s`. Raises
    `GatewayError`."""
    return await _until_up(
        lambda: sampler.sample_turn(TurnRequest(prompt_tokens, sampling, uuid.uuid4().hex)), deadline_s
    )


async def parse_reply(
    sampler: Sampler, text: str, tools: Sequence[dict[str, Any]], opening: str, deadline_s: float
) -> ParsedReply:
    """As `sample_turn`. `opening`: what the chat template writes before a reply."""
    return await _until_up(lambda: sampler.parse_reply(text, tools, opening), deadline_s)


async def _until_up(ask: Callable[[], Awaitable[Result]], deadline_s: float) -> Result:
    while True:
        try:
            return await ask()
        except EngineDown as error:
            if asyncio.get_running_loop().time() >= deadline_s:
                raise GatewayError(503, f"the engine is down: {error}") from error
        except EngineError as error:
            raise GatewayError(502, f"the engine failed on this turn: {error}") from error
        await asyncio.sleep(RESEND_PAUSE_S)
