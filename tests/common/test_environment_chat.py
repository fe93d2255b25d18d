"""What an environment talks with: conversations, tool calls, schemas, against an endpoint that keeps the contract."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from headrace.common.environments import BlockingReply, ChatError, Reply, ToolCall, client, schema
from headrace.common.environments.client import ChatClient
from headrace.common.environments.tool_calls import MAX_CALLS, MAX_RESULT_BYTES
from tests.support.chat_endpoint import Answer, Answering, ChatEndpoint, at_limit, refuses, says
from tests.support.guard import GUARD_S

QUESTION = {"role": "user", "content": "3 * 4?"}
Scenario = Callable[[ChatEndpoint, ChatClient], Awaitable[None]]


def talk(answer: Answering, scenario: Scenario) -> list[dict[str, Any]]:
    """Plays the scenario; returns the bodies of its requests."""

    async def whole() -> list[dict[str, Any]]:
        async with asyncio.timeout(GUARD_S), ChatEndpoint(answer) as endpoint, ChatClient() as http:
            await scenario(endpoint, http)
            return [request.body for request in endpoint.requests]

    return asyncio.run(whole())


def in_turn(*answers: Answer) -> Answering:
    left = list(answers)
    return lambda body: left.pop(0)


def calculate(expression: str) -> str:
    """The value of an arithmetic expression."""
    return {"3 * 4": "12"}[expression]


def test_a_conversation_grows_by_what_is_said_and_what_is_replied() -> None:
    async def scenario(endpoint: ChatEndpoint, http: ChatClient) -> None:
        chat = endpoint.chat(http, QUESTION, tools=[schema(calculate)])
        reply = await chat.reply()
        assert (reply.text, reply.reasoning, reply.finish_reason) == ("", "hm", "tool_calls")
        assert reply.tool_calls == [ToolCall("calculate", {"expression": "3 * 4"}, "call-0")]
        reply = await chat.reply(*await reply.run(calculate), "Well?", tools=[], max_tokens=7)
        assert (reply.text, reply.tool_calls, reply.finish_reason) == ("12", [], "stop")
        roles = [message["role"] for message in chat.messages]
        assert roles == ["user", "assistant", "tool", "user", "assistant"]

    call = says("", ("calculate", '{"expression": "3 * 4"}'), reasoning_content="hm")
    first, second = talk(in_turn(call, says("12")), scenario)
    assert first == {"model": "policy", "messages": [QUESTION], "tools": [schema(calculate)]}
    assert second["messages"] == [
        QUESTION,
        call[1]["choices"][0]["message"],
        {"role": "tool", "tool_call_id": "call-0", "name": "calculate", "content": "12"},
        {"role": "user", "content": "Well?"},
    ]
    assert "tools" not in second and second["max_tokens"] == 7


def test_a_plain_rollout_talks_from_a_thread() -> None:
    async def scenario(endpoint: ChatEndpoint, http: ChatClient) -> None:
        chat = endpoint.blocking_chat(http, QUESTION)

        def rollout() -> str:
            reply = chat.reply()
            assert isinstance(reply, BlockingReply)
            return chat.reply(*reply.run(calculate)).text

        assert await asyncio.to_thread(rollout) == "12"
        assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]

    talk(in_turn(says("", ("calculate", '{"expression": "3 * 4"}')), says("12")), scenario)


@pytest.mark.parametrize("limit", ["max_turns", "max_tokens", "max_segments"])
def test_at_a_limit_the_reply_is_empty_and_names_it(limit: str) -> None:
    async def scenario(endpoint: ChatEndpoint, http: ChatClient) -> None:
        chat = endpoint.chat(http, QUESTION)
        assert await chat.reply("More.") == Reply(finish_reason=limit)  # type: ignore[arg-type]
        assert [message["role"] for message in chat.messages] == ["user", "user"]

    talk(lambda body: at_limit(limit), scenario)


def test_a_full_context_is_a_limit() -> None:
    async def scenario(endpoint: ChatEndpoint, http: ChatClient) -> None:
        assert await endpoint.chat(http, QUESTION).reply() == Reply(finish_reason="context")

    talk(lambda body: refuses(400, "no room", "context_length_exceeded"), scenario)


@pytest.mark.parametrize("status", [400, 401, 409, 413, 500])
def test_a_refused_request_raises_with_the_reason(status: int) -> None:
    async def scenario(endpoint: ChatEndpoint, http: ChatClient) -> None:
        with pytest.raises(ChatError, match=f"the model's endpoint answered {status}: the reason"):
            await endpoint.chat(http, QUESTION).reply()

    assert len(talk(lambda body: refuses(status, "the reason"), scenario)) == 1


def test_a_request_that_got_no_answer_is_sent_again_as_a_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_PAUSE_S", 0.0)

    async def scenario(endpoint: ChatEndpoint, http: ChatClient) -> None:
        assert (await endpoint.chat(http, QUESTION).reply()).text == "12"
        counts = [request.headers["x-stainless-retry-count"] for request in endpoint.requests]
        assert counts == ["0", "1", "2"]
        assert len({request.headers["Idempotency-Key"] for request in endpoint.requests}) == 1
        assert (await endpoint.chat(http, QUESTION).reply()).text == "13"
        assert endpoint.requests[-1].headers["x-stainless-retry-count"] == "0"
        assert len({request.headers["Idempotency-Key"] for request in endpoint.requests}) == 2

    restarts = refuses(503, "the engine restarts")
    bodies = talk(in_turn(restarts, restarts, says("12"), says("13")), scenario)
    assert len(bodies) == 4


def test_while_the_endpoint_is_away_the_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_PAUSE_S", 0.01)

    async def whole() -> None:
        async with ChatClient() as http:
            async with ChatEndpoint(lambda body: says("")) as gone:
                port = int(gone.base_url.split(":")[2].partition("/")[0])
            waiting = asyncio.create_task(http.sample(f"http://127.0.0.1:{port}/v1", "secret", {}))
            await asyncio.wait([waiting], timeout=0.1)
            assert not waiting.done()
            waiting.cancel()

    asyncio.run(whole())


def run(functions: list[Callable[..., Any]], *calls: tuple[str, dict[str, Any]]) -> list[str]:
    made = [ToolCall(name, arguments, str(index)) for index, (name, arguments) in enumerate(calls)]
    messages = asyncio.run(Reply(tool_calls=made).run(*functions))
    assert messages == BlockingReply(tool_calls=made).run(*functions)
    assert [message["tool_call_id"] for message in messages] == [str(index) for index in range(len(messages))]
    return [message["content"] for message in messages]


def test_results_become_texts() -> None:
    async def later(n: int) -> list[int]:
        return [n]

    def nothing() -> None:
        pass

    def half() -> str:
        return "\ud800"

    functions: list[Callable[..., Any]] = [calculate, later, nothing, half]
    assert run(
        functions, ("calculate", {"expression": "3 * 4"}), ("later", {"n": "2"}), ("nothing", {}), ("half", {})
    ) == [
        "12",
        "[2]",
        "null",
        "\\ud800",
    ]


def test_what_goes_wrong_with_a_call_is_for_the_model_to_read() -> None:
    def fail() -> str:
        raise RuntimeError("the server is down")

    def long() -> str:
        return "x" * (MAX_RESULT_BYTES + 1)

    faults = {
        ("divide", "{}"): r"there is no function 'divide'; expected one of \['calculate', 'fail', 'long'\]",
        ("calculate", "{}"): "calculate: expression: Missing required argument",
        ("calculate", '{"expression": [1]}'): "expression: Input should be a valid string",
        ("calculate", '{"expression": "3 * 4", "base": 10}'): "base: Unexpected keyword argument",
        ("calculate", '{"expression": "1 / 0"}'): "calculate: KeyError: '1 / 0'",
        ("calculate", '{"expression": '): "its arguments are no JSON: ",
        ("calculate", "[1, 2]"): r"its arguments are \[1, 2\], expected an object",
        ("fail", "{}"): "fail: RuntimeError: the server is down",
        ("long", ""): "long: its result has 65,537 bytes, expected at most 65,536",
    }

    async def scenario(endpoint: ChatEndpoint, http: ChatClient) -> None:
        reply = await endpoint.chat(http, QUESTION).reply()
        for message, problem in zip(await reply.run(calculate, fail, long), faults.values(), strict=True):
            with pytest.raises(AssertionError, match=f"^error: .*{problem}"):
                raise AssertionError(message["content"])

    talk(lambda body: says("", *faults), scenario)


def test_of_many_calls_the_first_are_answered_and_the_last_says_so() -> None:
    called = []

    def note(n: int) -> int:
        called.append(n)
        return n

    texts = run([note], *(("note", {"n": n}) for n in range(100)))
    assert called == [*range(MAX_CALLS)] * 2 and len(texts) == MAX_CALLS
    assert texts[:-1] == [str(n) for n in range(MAX_CALLS - 1)]
    assert texts[-1] == "63\nerror: 36 more calls were not answered; expected at most 64"


def test_functions_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two functions have one name"):
        run([calculate, lambda: 1, lambda: 2])


def test_a_schema_has_names_types_defaults_and_descriptions() -> None:
    def search(
        query: str,
        limit: Annotated[int, Field(description="How many")] = 5,
        *,
        order: Literal["new", "old"] = "new",
        tags: list[str] | None = None,
    ) -> list[str]:
        """Searches the shop.

        Goes on.

        Args:
            query (str): The words,
                in any order.
            tags: Optional: labels.

        Returns:
            query: not this.
        """
        return []

    assert schema(search) == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Searches the shop.\n\nGoes on.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "The words, in any order."},
                    "limit": {"type": "integer", "default": 5, "description": "How many"},
                    "order": {"type": "string", "enum": ["new", "old"], "default": "new"},
                    "tags": {
                        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                        "default": None,
                        "description": "Optional: labels.",
                    },
                },
                "required": ["query"],
            },
        },
    }
    json.dumps(schema(search))


def test_a_method_is_described_without_self() -> None:
    class Shop:
        def buy(self) -> None:
            """Buys it."""

    assert schema(Shop().buy)["function"]["parameters"] == {"type": "object", "properties": {}}


def test_functions_that_a_model_cannot_call_are_refused() -> None:
    def undocumented(a: int) -> None: ...
    def positional(a: int, /) -> None:
        """Does it."""

    def several(*a: int) -> None:
        """Does it."""

    def odd(a: threading.Lock) -> None:
        """Does it."""

    refused: dict[Callable[..., Any], str] = {
        undocumented: "function 'undocumented' has no docstring",
        positional: "function 'positional': its parameter 'a: int' has no name",
        several: r"function 'several': its parameter '\*a: int' has no name",
        odd: "function 'odd': .*expected parameters with names, of types that JSON has",
    }
    for function, reason in refused.items():
        with pytest.raises(ValueError, match=reason):
            schema(function)


def test_a_task_module_loads_no_client() -> None:
    """The learner imports it too, and needs only schemas."""
    program = "import sys, headrace.common.environments; sys.exit('aiohttp' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
