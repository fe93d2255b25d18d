"""A model behind an OpenAI-compatible endpoint in the engine's place: replies without tokens."""

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import httpx

from headrace.common.http.addresses import bearer_header
from headrace.common.wire import Message, Sampling
from headrace.generation.gateway.errors import GatewayError
from headrace.generation.gateway.replies import ChatReply

KEY_VARIABLE = "OPENAI_API_KEY"
CONNECT_TIMEOUT_S = 10.0


class RemoteModel:
    """`system_prompt` stands before every conversation without a system message."""

    def __init__(self, base_url: str, model: str, system_prompt: str | None) -> None:
        self.name = model
        self._url = f"{base_url}/chat/completions"
        self._system: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        key = os.environ.get(KEY_VARIABLE)
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.AsyncClient(timeout=timeout, headers=bearer_header(key) if key else {})

    async def aclose(self) -> None:
        await self._http.aclose()

    async def reply(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], sampling: Sampling
    ) -> ChatReply:
        """Raises `GatewayError` with what the endpoint answered."""
        has_system = any(message["role"] == "system" for message in messages)
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [_as_sent(message) for message in [*([] if has_system else self._system), *messages]],
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
        }
        body |= {"stop": sampling.stop} if sampling.stop else {}
        body |= {"tools": list(tools)} if tools else {}
        try:
            response = await self._http.post(self._url, json=body)
        except httpx.HTTPError as error:
            raise GatewayError(502, f"{self._url} does not answer: {type(error).__name__}: {error}") from error
        if response.status_code != httpx.codes.OK:
            raise GatewayError(502, f"{self._url} answered {response.status_code}: {response.text}")
        try:
            return _chat_reply(response.json(), self.name)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise GatewayError(502, f"{self._url} answered what is no reply: {response.text}") from error


def _as_sent(message: Message) -> Message:
    """As OpenAI's API has it: arguments of tool calls as text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _as_text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _chat_reply(body: dict[str, Any], model: str) -> ChatReply:
    choice = body["choices"][0]
    given = choice["message"]
    message: Message = {"role": "assistant", "content": given.get("content") or ""}
    reasoning = given.get("reasoning_content") or given.get("reasoning")
    message |= {"reasoning_content": reasoning} if reasoning else {}
    message |= {"tool_calls": given["tool_calls"]} if given.get("tool_calls") else {}
    reason: Any = choice.get("finish_reason") or "stop"
    if reason not in ("stop", "length", "tool_calls"):
        raise ValueError(f"finished with {reason}")
    return ChatReply(str(body.get("id") or ""), int(time.time()), model, message, reason, body.get("usage") or {})
