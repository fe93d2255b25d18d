"""OpenAI's own Python client at the gateway: whole and streamed, with tools, with its retries and its errors."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from headrace.common.models.chat_template import QUESTION
from headrace.common.models.template_probe import FOLLOW_UP, TOOL, TOOL_NAME
from headrace.common.wire import Limits
from headrace.generation.engine.reply_parsing import ParsedCall, ParsedReply
from tests.support.gateways import Client, FakeSampler, SharedGateways

openai = pytest.importorskip("openai")
CALLING = [ParsedCall(TOOL_NAME, '{"first": 3, "second": 4}'), ParsedCall(TOOL_NAME, '{"first": 5, "second": 6}')]
Play = Callable[..., None]


@pytest.fixture(scope="module")
def play() -> Iterator[Play]:
    shared = SharedGateways()

    def play_with_openai(body: Callable[[Any, Client, FakeSampler], Awaitable[None]], **how: Any) -> None:
        async def run(client: Client, sampler: FakeSampler) -> None:
            episode = client.episode
            async with openai.AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key) as agent:
                await body(agent.chat.completions, client, sampler)

        shared.play(run, **how)

    yield play_with_openai
    shared.close()


def test_a_conversation_is_one_segment(play: Play) -> None:
    async def run(completions: Any, client: Client, sampler: FakeSampler) -> None:
        sampler.says = [" It is 7.\n", "It is 11."]
        first = await completions.create(model="any", messages=[QUESTION], temperature=0)
        message = first.choices[0].message
        assert (message.content, first.choices[0].finish_reason) == (" It is 7.\n", "stop")
        second = await completions.create(model="any", messages=[QUESTION, message, FOLLOW_UP])
        assert second.choices[0].message.content == "It is 11."
        assert second.usage.prompt_tokens > first.usage.total_tokens
        client.episode.record.seal()

    play(run)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_tools_are_called_and_answered_in_one_segment(play: Play, is_streamed: bool) -> None:
    async def run(completions: Any, client: Client, sampler: FakeSampler) -> None:
        sampler.parse = lambda text, tools: ParsedReply("", "", CALLING if text == "call" else ())
        sampler.says = ["call", "It is 7 and 11."]
        if is_streamed:
            calls = await streamed_calls(completions)
        else:
            reply = await completions.create(model="any", messages=[QUESTION], tools=[TOOL])
            calls = [call.model_dump() for call in reply.choices[0].message.tool_calls]
        assert [call["function"]["arguments"] for call in calls] == [call.arguments_json for call in CALLING]
        answers = [{"role": "tool", "tool_call_id": call["id"], "content": "7"} for call in calls]
        history = [QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}, *answers]
        await completions.create(model="any", messages=history, tools=[TOOL])
        (first, first_reply), (second, _) = sampler.model.asked
        assert second[: len(first) + len(first_reply)] == (*first, *first_reply)

    play(run, ticket={"tools": [TOOL]})


async def streamed_calls(completions: Any) -> list[dict[str, Any]]:
    stream = await completions.create(
        model="any", messages=[QUESTION], tools=[TOOL], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage.completion_tokens > 0 and chunks[-2].choices[0].finish_reason == "tool_calls"
    return [call.model_dump(exclude={"index"}) for call in chunks[0].choices[0].delta.tool_calls]


def test_its_retry_after_a_failure_is_answered(play: Play) -> None:
    async def run(completions: Any, client: Client, sampler: FakeSampler) -> None:
        sampler.num_down = 1
        reply = await completions.create(model="any", messages=[QUESTION])
        assert reply.choices[0].finish_reason in ("stop", "length")
        assert (len(sampler.requests), client.episode.record.num_turns) == (2, 1)

    play(run, engine_wait_s=0.0)


def test_it_knows_the_errors(play: Play) -> None:
    async def run(completions: Any, client: Client, sampler: FakeSampler) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await completions.create(model="any", messages=[{"role": "user", "content": "so " * 200}])
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="response_format would constrain what is sampled"):
            await completions.create(model="any", messages=[QUESTION], response_format={"type": "json_object"})
        with pytest.raises(openai.AuthenticationError):
            stranger = openai.AsyncOpenAI(base_url=client.episode.base_url, api_key="wrong")
            await stranger.models.list()

    play(run, ticket={"limits": Limits(9, 99, 120, 9)})


def test_models_are_listed(play: Play) -> None:
    async def run(completions: Any, client: Client, sampler: FakeSampler) -> None:
        assert [model.id async for model in completions._client.models.list()] == ["policy"]

    play(run)
