"""A reply's reasoning, content and tool calls, by the parsers of the real SGLang and of the scripted server."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from headrace.common.config import EngineConfig, EnvironmentConfig
from headrace.generation.engine.client import Engine, EngineError
from headrace.generation.engine.reply_parsing import ParsedCall, ParsedReply
from headrace.generation.engine.server import EngineServer
from tests.support.chat_families import TEMPLATES
from tests.support.fake_sglang import FakeSglang

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "The value of an expression.",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": []},
        },
    }
]
CALL = '<tool_call>{"name": "calculate", "arguments": {"expression": "1 + 1"}}</tool_call>'
WRITTEN = ParsedCall("calculate", '{"expression": "1 + 1"}')


def parse(
    url: str, text: str, tools: Sequence[dict[str, Any]] = TOOLS, opening: str = "", **settings: Any
) -> ParsedReply:
    async def run() -> ParsedReply:
        parsers: Any = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
        engine = Engine(url, **parsers | settings)
        try:
            return await engine.parse_reply(text, tools, opening)
        finally:
            await engine.aclose()

    return asyncio.run(run())


@pytest.fixture(scope="module")
def real_url(engine_url: str) -> str:
    return engine_url


@pytest.fixture(params=["real", "scripted"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue("real_url") if request.param == "real" else request.getfixturevalue("fake").url
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", ParsedReply("42")),
        ("", ParsedReply("")),
        (CALL, ParsedReply("", "", [WRITTEN])),
        (f"So:\n{CALL}", ParsedReply("So:", "", [WRITTEN])),
        (f"<think>two</think>{CALL}{CALL}", ParsedReply("", "two", [WRITTEN, WRITTEN])),
        ("<think>two</think>\n42", ParsedReply("\n42", "two")),
        ("<think>cut", ParsedReply("", "cut")),
        ("<think>", ParsedReply("<think>")),
        (
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            ParsedReply("", "", [ParsedCall("unknown", "{}")]),
        ),
    ],
)
def test_a_reply_has_reasoning_content_and_calls(url: str, text: str, expected: ParsedReply) -> None:
    found = parse(url, text)
    assert (found.content, found.reasoning, list(found.tool_calls)) == (
        expected.content,
        expected.reasoning,
        list(expected.tool_calls),
    )


ROLE = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("opening", "parser", "text", "expected"),
    [
        (ROLE, "qwen3", "42", ("42", "")),
        (ROLE, "qwen3", "<think>two</think>42", ("42", "two")),
        (f"{ROLE}<think>\n", "qwen3", "two</think>42", ("42", "two")),
        (f"{ROLE}<think>\n", "qwen3", "cut", ("", "cut")),
        (f"{ROLE}<think>\n\n</think>\n\n", "qwen3", "42", ("42", "")),
        (f"{ROLE}<think>\n\n</think>\n\n", "deepseek-r1", "42", ("42", "")),
        ("<｜Assistant｜>", "deepseek-r1", "two</think>42", ("42", "two")),
        ("<｜Assistant｜><think>\n", "deepseek-r1", "two</think>42", ("42", "two")),
        ("<|im_assistant|>assistant<|im_middle|>◁think▷", "kimi", "two◁/think▷42", ("42", "two")),
    ],
)
def test_reasoning_may_begin_in_what_the_template_writes(
    engine_url: str, opening: str, parser: str, text: str, expected: tuple[str, str]
) -> None:
    assert parse(engine_url, text, [], opening, reasoning_parser=parser) == ParsedReply(*expected)


@pytest.mark.parametrize(
    "text",
    [
        "Look: <tool_call>{not JSON}</tool_call> and more",
        '<tool_call>{"name": "calculate", "arguments": {"expression"',
        "<tool_call></tool_call>",
        "<tool_call>[]</tool_call>",
        '<tool_call>"calculate"</tool_call>',
        "<tool_call>null</tool_call>",
        "</tool_call><tool_call>",
    ],
)
def test_a_malformed_call_is_content(engine_url: str, text: str) -> None:
    assert parse(engine_url, text) == ParsedReply(text, "", [])


def test_a_hundred_calls_are_all_found(url: str) -> None:
    assert list(parse(url, CALL * 100).tool_calls) == [WRITTEN] * 100


@pytest.mark.parametrize("parser", ["hermes", "qwen25", "llama3", "mistral", "deepseekv3", "kimi_k2", "glm45"])
def test_no_parser_of_sglangs_deletes_a_text_without_a_call(engine_url: str, parser: str) -> None:
    texts = [
        *("", " ", "42", "<tool_call>\n{", "[TOOL_CALLS] [{", "<|python_tag|>{", "{}", "[]", "é終\n"),
        *("<|tool_calls_section_begin|>x", "<tool_call>calculate\n<arg_key>a", "<｜tool▁calls▁begin｜>x"),
    ]
    for text in texts:
        found = parse(engine_url, text, tool_call_parser=parser)
        assert found == ParsedReply(text, "", []) or found.tool_calls, text


def test_a_parser_that_fails_leaves_the_text(fake: FakeSglang) -> None:
    for path in ("/separate_reasoning", "/parse_function_call"):
        fake.replies[path] = 500, {"detail": "list index out of range"}
    assert parse(fake.url, f"<think>a</think>{CALL}") == ParsedReply(f"<think>a</think>{CALL}", "", [])


def test_tools_that_the_engine_refuses_are_an_error(engine_url: str) -> None:
    with pytest.raises(EngineError, match=r"/parse_function_call answered 400: .*validation error"):
        parse(engine_url, "42", [{"type": "function"}])


def test_nothing_is_asked_where_nothing_is_to_be_parsed(fake: FakeSglang) -> None:
    async def run() -> None:
        engine = Engine(fake.url)
        for _ in range(3):
            assert await engine.parse_reply(CALL, []) == ParsedReply(CALL)
        await engine.aclose()

    asyncio.run(run())
    assert fake.paths == ["/model_info"]


def test_the_engines_parsers_are_used_unless_others_are_named(fake: FakeSglang) -> None:
    fake.have_parsers("qwen25", "qwen3")
    for tool_call_parser, expected in (("auto", ["qwen3", "qwen25"]), ("hermes", ["qwen3", "hermes"])):
        fake.calls.clear()
        parse(fake.url, "x", tool_call_parser=tool_call_parser, reasoning_parser="auto")
        _, (_, separated), (_, parsed) = fake.calls
        assert [separated["reasoning_parser"], parsed["tool_call_parser"]] == expected
        assert parsed["tools"] == json.loads(json.dumps(TOOLS))


def test_tools_without_a_parser_are_one_clear_error(fake: FakeSglang) -> None:
    async def run(engine: Engine) -> None:
        for asking in (engine.check_tool_calls(), engine.parse_reply("x", TOOLS)):
            with pytest.raises(EngineError, match=r"^the engine has no parser for tool calls[^\n]*$"):
                await asking
        await engine.aclose()

    asyncio.run(run(Engine(fake.url)))
    fake.have_parsers("hermes")
    asyncio.run(Engine(fake.url).check_tool_calls())


@pytest.mark.slow
def test_parsers_are_found_in_the_chat_template(demo_policy: Path, tmp_path: Path) -> None:
    template = str(TEMPLATES / "qwen3.jinja")
    server = EngineServer(
        EngineConfig(device="cpu"), "float32", tmp_path / "log", environment=EnvironmentConfig(), chat_template=template
    )
    asyncio.run(server.start(demo_policy, 1))
    try:
        called = CALL.replace("<tool_call>", "<tool_call>\n").replace("</tool_call>", "\n</tool_call>")
        found = parse(
            server.url, f"<think>two</think>{called}", tool_call_parser="auto", reasoning_parser="auto", opening=ROLE
        )
    finally:
        asyncio.run(server.stop())
    assert found == ParsedReply("", "two", [WRITTEN])
