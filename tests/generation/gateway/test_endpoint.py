"""The endpoint as an OpenAI client sees it: replies, errors, retries, hang-ups, limits, secrets."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest

from headrace.common.models.chat_template import QUESTION
from headrace.common.models.template_probe import FOLLOW_UP, TOOL, TOOL_NAME
from headrace.common.wire import Limits
from headrace.generation.engine.http_calls import EngineError
from headrace.generation.engine.reply_parsing import ParsedCall, ParsedReply
from headrace.generation.gateway import endpoint
from headrace.generation.gateway.endpoint import MAX_REQUEST_BYTES
from tests.support.chat_families import FAMILIES, TOKENIZERS
from tests.support.episodes import episode_ticket, rendering_of
from tests.support.gateways import Client, FakeSampler, SharedGateways, a_client, a_gateway
from tests.support.guard import GUARD_S

RETRY = {"x-stainless-retry-count": "1"}
SAID = {"role": "assistant", "content": "It is 7."}
Play = Callable[..., None]


@pytest.fixture(scope="module")
def play() -> Iterator[Play]:
    shared = SharedGateways()
    yield shared.play
    shared.close()


def limits(**changes: int) -> dict[str, Limits]:
    fields = {"max_turns": 9, "max_tokens": 400, "max_context_tokens": 2000, "max_segments": 9}
    return {"limits": Limits(**fields | changes)}


def test_a_reply_is_openais_and_the_conversation_goes_on_behind_it(play: Play) -> None:
    async def body(client: Client, sampler: FakeSampler) -> None:
        sampler.says = ["It is 7.", "11"]
        response = await client.post(QUESTION)
        reply = response.json()
        assert reply["choices"] == [{"index": 0, "message": SAID, "logprobs": None, "finish_reason": "stop"}]
        assert reply["object"] == "chat.completion" and reply["model"] == "policy"
        first = sampler.requests[0].prompt_tokens
        assert first == episode_ticket("qwen2.5").prompt_tokens
        assert reply["usage"]["prompt_tokens"] == len(first)
        assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
        await client.ask(QUESTION, SAID, FOLLOW_UP)
        sampled = list(sampler.model.asked[0][1])
        assert sampler.requests[1].prompt_tokens[: len(first) + len(sampled)] == [*first, *sampled]
        assert client.episode.record.num_turns == 2

    play(body)


def test_a_reply_is_parsed_with_what_the_template_wrote_before_it(play: Play) -> None:
    """Reasoning may have begun there."""

    async def body(client: Client, sampler: FakeSampler) -> None:
        await client.ask(QUESTION)
        assert sampler.openings == ["<|im_start|>assistant\n"]

    play(body)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_opening_is_the_end_of_a_prompt(name: str) -> None:
    tokens = rendering_of(name).whole([QUESTION], [])
    opening = rendering_of(name).opening
    assert opening and TOKENIZERS[name].decode(tokens).endswith(opening)


def test_tool_calls_are_told_apart_and_named(play: Play) -> None:
    async def body(client: Client, sampler: FakeSampler) -> None:
        calls = [ParsedCall(TOOL_NAME, '{"first": 3}'), ParsedCall("unknown", "{broken")]
        sampler.parse = lambda text, tools: ParsedReply("", "Hm.", calls if tools else ())
        choice = await client.ask(QUESTION, tools=[TOOL])
        assert choice["finish_reason"] == "tool_calls"
        message = choice["message"]
        assert message["reasoning_content"] == "Hm."
        assert [call["id"] for call in message["tool_calls"]] == ["call00000", "call00001"]
        assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"first": 3}', "{broken"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "7"} for call in message["tool_calls"]]
        again = await client.ask(QUESTION, message, *results, tools=[TOOL])
        assert again["message"]["tool_calls"][0]["id"] == "call00002"
        segments, turns = client.episode.record._segments, client.episode.record.num_turns
        assert (len(segments), turns) == (1, 2)

    play(body, ticket={"tools": [TOOL]})


@pytest.mark.parametrize("how", [{"tool_choice": "none"}, {"max_tokens": 1}])
def test_no_calls_are_looked_for_in_a_reply_that_was_cut_or_should_have_none(play: Play, how: dict[str, Any]) -> None:
    async def body(client: Client, sampler: FakeSampler) -> None:
        offered = []

        def parse(text: str, tools: Sequence[Any]) -> ParsedReply:
            offered.append(tools)
            return ParsedReply(text)

        sampler.parse = parse
        sampler.says = ["so so so so"]
        await client.ask(QUESTION, tools=[TOOL], **how)
        assert offered == [[]]

    play(body)


def test_a_clients_stop_text_ends_the_reply_and_is_not_shown(play: Play) -> None:
    async def body(client: Client, sampler: FakeSampler) -> None:
        sampler.says = ["so so END"]
        choice = await client.ask(QUESTION, stop=["END", "FIN"])
        assert choice["message"]["content"] == "so so "
        assert sampler.requests[0].sampling.stop == ["END", "FIN"]

    play(body)


def test_what_a_client_sends_never_changes_how_is_sampled() -> None:
    async def run() -> None:
        async with a_gateway() as (gateway, sampler):
            ticket = episode_ticket("qwen2.5")
            async with a_client(gateway, ticket) as client:
                odd = {"temperature": 0, "top_p": 0.1, "top_k": 1, "seed": 3, "presence_penalty": 2, "model": "gpt"}
                await client.ask(QUESTION, **odd, frequency_penalty=1.5, min_p=0.9, surprise=1, max_tokens=5)
                asked = sampler.requests[0].sampling
                assert asked.max_new_tokens == 5
                assert (asked.temperature, asked.stop_token_ids) == (1.0, ticket.sampling.stop_token_ids)
            assert gateway.ignored["temperature"] == 1 and gateway.ignored["other"] == 1
            assert gateway.answers == {200: 1}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"n": 2}, "n would constrain"),
        ({"response_format": {"type": "json_object"}}, "response_format would constrain what is sampled"),
        ({"logit_bias": {"5": 1}}, "logit_bias would constrain"),
        ({"tool_choice": "required"}, "tool_choice would constrain"),
        ({"tool_choice": {"type": "function"}}, "tool_choice would constrain"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "strict would constrain"),
        ({"guided_regex": "a*"}, "guided_regex would constrain"),
    ],
)
def test_parameters_that_constrain_what_is_sampled_are_refused_or_ignored(
    play: Play, body: dict[str, Any], expected: str
) -> None:
    async def refused(client: Client, sampler: FakeSampler) -> None:
        response = await client.post(QUESTION, **body)
        assert response.status_code == 400 and expected in response.json()["error"]["message"]
        assert not sampler.requests

    async def ignored(client: Client, sampler: FakeSampler) -> None:
        await client.ask(QUESTION, **body)

    play(refused)
    play(ignored, constrained="ignore")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": []}, "messages: expected a list of 1 to 4096 messages"),
        ({"messages": "hello"}, "messages: expected a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url', expected only text"),
        ({"messages": [QUESTION], "max_tokens": 0}, "max_tokens is 0, expected 1 to"),
        ({"messages": [QUESTION], "max_tokens": True}, "max_tokens is True"),
        ({"messages": [QUESTION], "max_completion_tokens": "many"}, "max_completion_tokens is 'many'"),
        ({"messages": [QUESTION], "stop": [""]}, "stop: expected at most 32 texts"),
        ({"messages": [QUESTION], "stop": ["a"] * 33}, "stop: expected at most 32 texts"),
        ({"messages": [QUESTION], "tools": {}}, "tools: expected a list of objects"),
        ({"messages": [QUESTION], "tools": [{}]}, "tool 0 without the name of a function"),
        ({"messages": [QUESTION], "functions": []}, "functions is not supported, expected tools"),
        ({"messages": [QUESTION], "metadata": json.loads("[" * 40 + "]" * 40)}, "nested more than 32 deep"),
        ([], "the body is a list, expected an object"),
    ],
)
def test_what_is_not_understood_is_said_in_one_line(play: Play, body: Any, expected: str) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        response = await client.http.post("/chat/completions", json=body)
        error = response.json()["error"]
        assert response.status_code == 400 and expected in error["message"] and "\n" not in error["message"]

    play(run)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"messages": NaN}', b'["\\ud800"]', b"[" * 100_000])
def test_a_body_that_is_no_json_is_refused(play: Play, content: bytes) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        response = await client.http.post("/chat/completions", content=content)
        assert response.status_code == 400 and "the body is not JSON" in response.json()["error"]["message"]

    play(run)


def test_a_template_that_refuses_the_messages_is_the_clients_mistake(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        response = await client.post(QUESTION, QUESTION)
        assert response.status_code == 400 and "roles must alternate" in response.json()["error"]["message"]

    play(run, name="gemma3")


def test_a_ticket_whose_messages_are_not_understood_is_told_so_at_its_first_request(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        response = await client.post(odd)
        assert response.status_code == 400 and "messages[0].role is 'robot'" in response.json()["error"]["message"]

    odd = {"role": "robot", "content": "3 + 4 = ?"}
    play(run, ticket={"messages": [odd], "prompt_tokens": [5, 6]})


def test_a_request_beyond_the_largest_size_is_refused(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        response = await client.http.post("/chat/completions", content=b" " * (MAX_REQUEST_BYTES + 1))
        assert response.status_code == 413

    play(run)


def test_a_request_with_a_retrys_marker_gets_the_reply_of_the_first(play: Play) -> None:
    """Without one it is a new sample."""

    async def run(client: Client, sampler: FakeSampler) -> None:
        first = await client.post(QUESTION)
        assert (await client.post(QUESTION, headers=RETRY)).content == first.content
        assert (await client.post(QUESTION)).content != first.content
        assert (await client.post(FOLLOW_UP, headers=RETRY)).status_code == 200
        assert client.episode.record.num_turns == 3

    play(run)


def test_a_known_idempotency_key_gets_the_reply_of_the_first(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        keys = [{"Idempotency-Key": key} for key in "ab"]
        first, other = [await client.post(QUESTION, headers=key) for key in keys]
        again = [await client.post(QUESTION, headers=key) for key in keys]
        assert [one.content for one in again] == [first.content, other.content]
        assert first.content != other.content and client.episode.record.num_turns == 2

    play(run)


def test_a_client_that_hangs_up_and_retries_waits_for_the_first_turn(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        sampler.may_answer.clear()
        hanging_up = asyncio.create_task(client.post(QUESTION))
        await sampler.has_begun.wait()
        assert client.episode.environment_s == 0
        hanging_up.cancel()
        await asyncio.gather(hanging_up, return_exceptions=True)
        retry = asyncio.create_task(client.post(QUESTION, headers=RETRY))
        sampler.may_answer.set()
        assert (await retry).status_code == 200
        assert (len(sampler.requests), client.episode.record.num_turns, sampler.num_aborted) == (1, 1, 0)
        assert client.episode.environment_s > 0

    play(run)


def test_of_requests_alike_that_were_all_given_up_each_retry_gets_another(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        sampler.says = ["one", "two", "three"]
        sampler.may_answer.clear()
        given_up = [asyncio.create_task(client.post(QUESTION)) for _ in range(3)]
        while len(sampler.requests) < 3:
            await asyncio.sleep(0)
        for one in given_up:
            one.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        retries = [asyncio.create_task(client.ask(QUESTION, headers=RETRY)) for _ in range(3)]
        sampler.may_answer.set()
        assert sorted([(await one)["message"]["content"] for one in retries]) == ["one", "three", "two"]
        assert client.episode.record.num_turns == 3

    play(run)


@pytest.mark.parametrize("limit", ["max_turns", "max_tokens", "max_segments"])
def test_at_a_limit_the_reply_is_empty_and_the_tenth_is_an_error(play: Play, limit: str) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        sampler.says = ["so so so so so so so so"]
        first = await client.ask(QUESTION)
        assert "limit" not in first
        for _ in range(9):
            choice = await client.ask(FOLLOW_UP)
            assert choice["message"] == {"role": "assistant", "content": ""}
            assert (choice["finish_reason"], choice["limit"]) == ("length", limit)
        response = await client.post(FOLLOW_UP)
        assert response.status_code == 409 and limit in response.json()["error"]["message"]
        assert client.episode.record.num_turns == 1

    play(run, ticket=limits(**{limit: 1}))


def test_without_room_the_error_has_openais_code_and_a_shorter_conversation_goes_on(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        long = {"role": "user", "content": "so " * 200}
        for _ in range(3):
            for _ in range(5):
                response = await client.post(long)
                assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
            await client.ask(QUESTION)

    play(run, ticket=limits(max_context_tokens=200))


def test_a_request_waits_for_the_tokens_that_another_may_leave(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        sampler.may_answer.clear()
        sampler.says = ["so", "so"]
        both = [asyncio.create_task(client.ask(QUESTION)) for _ in range(2)]
        await sampler.has_begun.wait()
        sampler.may_answer.set()
        await asyncio.gather(*both)
        assert [request.sampling.max_new_tokens for request in sampler.requests] == [24, 24]

    play(run, ticket=limits(max_tokens=30))


def test_while_the_engine_is_down_the_same_tokens_are_sent_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.generation.gateway.sampling.RESEND_PAUSE_S", 0.001)

    async def run(client: Client, sampler: FakeSampler) -> None:
        sampler.num_down = 3
        await client.ask(QUESTION)
        assert len({tuple(request.prompt_tokens) for request in sampler.requests}) == 1
        assert len({request.rid for request in sampler.requests}) == 4
        assert client.episode.record.num_turns == 1

    play(run)


def test_an_engine_that_stays_down_is_said_and_the_request_may_come_again(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.generation.gateway.sampling.RESEND_PAUSE_S", 0.001)

    async def run(client: Client, sampler: FakeSampler) -> None:
        sampler.num_down = 1
        response = await client.post(QUESTION)
        assert response.status_code == 503 and "the engine is down" in response.json()["error"]["message"]
        assert (await client.post(QUESTION, headers=RETRY)).status_code == 200
        assert client.episode.record.num_turns == 1

    play(run, engine_wait_s=0.0, ticket=limits(max_turns=1))


def test_an_engine_that_fails_on_the_turn_is_said(play: Play) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        def fail(text: str, tools: Any) -> ParsedReply:
            raise EngineError("no parser for tool calls")

        sampler.parse = fail
        response = await client.post(QUESTION)
        assert response.status_code == 502 and "no parser for tool calls" in response.json()["error"]["message"]

    play(run)


def test_a_secret_opens_its_own_episode_while_that_is_open() -> None:
    async def run() -> None:
        async with a_gateway() as (gateway, _), httpx.AsyncClient(base_url=gateway.base_url) as stranger:
            for header in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer wrong"}):
                assert (await stranger.get("/models", headers=header)).status_code == 401
            ticket = episode_ticket("qwen2.5")
            async with a_client(gateway, ticket) as one, a_client(gateway, ticket) as other:
                assert (await one.http.get("/models")).json()["data"][0]["id"] == "policy"
                await one.ask(QUESTION)
                assert (one.episode.record.num_turns, other.episode.record.num_turns) == (1, 0)
            over = {"Authorization": f"Bearer {one.episode.api_key}"}
            response = await stranger.post("/chat/completions", headers=over, json={"messages": [QUESTION]})
            assert response.status_code == 409 and response.json()["error"]["message"] == "the episode is over"
            assert (await stranger.get("/models", headers=over)).status_code == 409

    asyncio.run(run())


def test_a_turn_that_is_under_way_when_its_episode_ends_is_aborted_and_never_recorded() -> None:
    async def run() -> None:
        async with a_gateway() as (gateway, sampler), a_client(gateway, episode_ticket("qwen2.5")) as client:
            async with gateway.open_episode(episode_ticket("qwen2.5")) as episode:
                late = Client(episode)
                sampler.may_answer.clear()
                asking = asyncio.create_task(late.post(QUESTION))
                await sampler.has_begun.wait()
            assert (await asking).status_code == 409
            assert (sampler.num_aborted, episode.record.num_turns) == (1, 0)
            sampler.may_answer.set()
            await client.ask(QUESTION)
            await late.http.aclose()

    asyncio.run(asyncio.wait_for(run(), GUARD_S))


def test_a_stream_is_kept_alive_while_its_reply_is_sampled(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "KEEP_ALIVE_S", 0.01)

    async def run(client: Client, sampler: FakeSampler) -> None:
        sampler.says = ["It is 7."]
        sampler.may_answer.clear()
        lines = []
        asked = {"messages": [QUESTION], "stream": True, "stream_options": {"include_usage": True}}
        async with client.http.stream("POST", "/chat/completions", json=asked) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                if lines.count(": the reply is being sampled") == 3:
                    sampler.may_answer.set()
        events = [line for line in lines if line.startswith("data: ")]
        assert len(events) == 4 and events[-1] == "data: [DONE]" and '"It is 7."' in events[0]
        assert '"finish_reason":"stop"' in events[1] and '"prompt_tokens"' in events[2]

    play(run)


def test_an_error_in_a_stream_that_has_begun_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "KEEP_ALIVE_S", 0.01)

    async def run() -> None:
        async with a_gateway() as (gateway, sampler), gateway.open_episode(episode_ticket("qwen2.5")) as episode:
            sampler.may_answer.clear()
            client = Client(episode)
            asked = {"messages": [QUESTION], "stream": True}
            async with client.http.stream("POST", "/chat/completions", json=asked) as response:
                lines = response.aiter_lines()
                await anext(lines)
                await episode.close()
                rest = [line async for line in lines]
            assert any(line.startswith('data: {"error"') and "the episode is over" in line for line in rest)
            await client.http.aclose()

    asyncio.run(asyncio.wait_for(run(), GUARD_S))
