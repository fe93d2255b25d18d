"""What a reply's text means: its reasoning, its content and its tool calls, by the engine's parsers.

The engine parses in its HTTP process (`/separate_reasoning`, `/parse_function_call`). Which parsers it has is asked
once (`/model_info`). What a model wrote raises no error: where a parser fails or finds no call, the text is content. So
is a text that a parser would delete (sgl-project/sglang#35565).
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from headrace.generation.engine.http_calls import EngineCalls, EngineError, EngineFault, Reply

AUTO = "auto"
WORD = "word"
MAX_OPENING_CHARS = 64
_log = logging.getLogger(__name__)


class ParsedCall(NamedTuple):
    """A tool call; the name may be unknown, and the arguments may not fit the tool's schema."""

    name: str
    arguments_json: str


class ParsedReply(NamedTuple):
    """The parts of a reply."""

    content: str
    reasoning: str = ""
    tool_calls: Sequence[ParsedCall] = ()


class _Parsers(msgspec.Struct):
    """The fields of `/model_info`; None if the engine was started without one, or has detected none."""

    tool_call_parser: str | None = None
    reasoning_parser: str | None = None


class _SeparatedReasoning(msgspec.Struct):
    reasoning_text: str | None
    text: str | None


class _Call(msgspec.Struct):
    name: str | None = None
    parameters: str = ""


class _ParsedCalls(msgspec.Struct):
    normal_text: str | None
    calls: list[_Call]


class ReplyParser:
    """Parses with parsers of the engine by their names in SGLang; `auto`: those that the engine reports."""

    def __init__(self, calls: EngineCalls, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO) -> None:
        self._calls = calls
        self._named = _Parsers(tool_call_parser, reasoning_parser)
        self._parsers: _Parsers | None = None
        self._beginnings: dict[str, str] = {}
        """By opening."""

    async def parse(self, text: str, tools: Sequence[dict[str, Any]], opening: str = "") -> ParsedReply:
        """The parts of a reply to a request that offered `tools`, as in OpenAI's API.

        `opening`: what the chat template writes before a reply, such as `<|im_start|>assistant\n<think>\n`; reasoning
        may have begun there. Raises `EngineError` if the engine cannot be reached, refuses the tools, or has no parser
        for tool calls.
        """
        parsers = await self._read_parsers()
        content, reasoning = text, ""
        if parsers.reasoning_parser is not None:
            content, reasoning = await self._separate_reasoning(text, opening, parsers.reasoning_parser)
        if not tools:
            return ParsedReply(content, reasoning)
        await self.check_tool_calls()
        body = {"text": content, "tools": tools, "tool_call_parser": parsers.tool_call_parser}
        parsed = await self._ask("/parse_function_call", _ParsedCalls, body)
        found = parsed.calls if parsed is not None else []
        calls = [ParsedCall(call.name, call.parameters or "{}") for call in found if call.name]
        return ParsedReply((parsed.normal_text or "") if parsed and calls else content, reasoning, calls)

    async def check_tool_calls(self) -> None:
        """Raises `EngineError` if the engine cannot parse tool calls."""
        if (await self._read_parsers()).tool_call_parser is None:
            raise EngineError(
                "the engine has no parser for tool calls, and its chat template shows none; expected a name in "
                "environment.tool_call_parser, for a task whose prompts have tools"
            )

    async def _separate_reasoning(self, text: str, opening: str, parser: str) -> tuple[str, str]:
        """Content and reasoning."""
        if opening not in self._beginnings:
            self._beginnings[opening] = await self._beginning(opening[-MAX_OPENING_CHARS:], parser)
        parts = await self._split(self._beginnings[opening] + text, parser)
        return parts if parts is not None and any(parts) else (text, "")

    async def _beginning(self, opening: str, parser: str) -> str:
        """The end of the opening that a reply is to be parsed with: the longest of which the parser leaves nothing."""
        for start, character in enumerate(opening):
            if not (character.isalnum() or character.isspace()):
                parts = await self._split(opening[start:] + WORD, parser)
                if parts is not None and sorted(part.strip() for part in parts) == ["", WORD]:
                    return opening[start:].rstrip()
        return ""

    async def _split(self, text: str, parser: str) -> tuple[str, str] | None:
        """Content and reasoning, which is empty if it is blank; None if the parser fails."""
        body = {"text": text, "reasoning_parser": parser}
        parts = await self._ask("/separate_reasoning", _SeparatedReasoning, body)
        if parts is None:
            return None
        reasoning = parts.reasoning_text or ""
        return parts.text or "", reasoning if reasoning.strip() else ""

    async def _read_parsers(self) -> _Parsers:
        if self._parsers is None:
            found = await self._calls.call("/model_info", _Parsers)
            named = {name: value for name, value in msgspec.structs.asdict(self._named).items() if value != AUTO}
            self._parsers = msgspec.structs.replace(found, **named)
        return self._parsers

    async def _ask(self, path: str, reply_type: type[Reply], body: dict[str, Any]) -> Reply | None:
        """The parser's reply; None if it failed on the text."""
        try:
            return await self._calls.call(path, reply_type, body)
        except EngineFault as error:
            _log.warning("a reply stays as it is: %s", error)
            return None
