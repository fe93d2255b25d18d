"""The tokens between two replies: what a chat template writes from the end of one to the beginning of the next.

A conversation goes on behind the tokens that were sampled, which are never decoded and encoded again. Only the new
messages are rendered: behind a stand-in for the reply, and what follows the stand-in is the bridge. It is cut at a
control token, across which no tokenizer merges.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

from headrace.common.models.chat_template import QUESTION, ChatTemplate, PromptError
from headrace.common.models.control_tokens import Piece, texts_of, tokens_of, unused_characters

ChatMessage = dict[str, Any]
"""A message as in OpenAI's API: `role`, `content`, and `tool_calls` or `tool_call_id` where it has them."""


class Bridge:
    """Of one model: its chat template, and the tokens that end a reply."""

    def __init__(self, chat: ChatTemplate, stop_token_ids: Collection[int]) -> None:
        self.chat = chat
        self.stop_token_ids = frozenset(stop_token_ids)

    def tokens(
        self, reply: ChatMessage, last_token: int, messages: Sequence[ChatMessage], tools: Sequence[Any] = ()
    ) -> list[int]:
        """What stands between a reply, whose last sampled token is `last_token`, and the reply to `messages`.

        Of `reply` only the names and ids of its tool calls count. A reply that was cut at a limit has no end: the
        bridge then begins with the template's. Raises `PromptError` if the template refuses the messages or does not
        show where a reply ends.
        """
        mark = "".join(unused_characters("".join(texts_of([reply, *messages, *tools]))))
        pieces = render_calls(self.chat, [QUESTION, _stand_in(reply, mark), *messages], tools)
        end = self.end_of_reply(pieces, mark)
        return tokens_of(pieces[end + (pieces[end].tokens[-1] == last_token) :])

    def end_of_reply(self, pieces: Sequence[Piece], text: str) -> int:
        """The place of the control token that ends the reply in which `text` stands last: the first behind it at which
        sampling stops, or the first at all (gpt-oss ends an earlier reply with another token than a sampled one)."""
        inside = [place for place, piece in enumerate(pieces) if text in piece.text]
        behind = [place for place in range(inside[-1], len(pieces)) if pieces[place].is_control] if inside else []
        stops = [place for place in behind if pieces[place].tokens[0] in self.stop_token_ids]
        if not behind:
            raise PromptError("the chat template does not show where a reply ends")
        return (stops or behind)[0]


def render_calls(
    chat: ChatTemplate, messages: list[ChatMessage], tools: Sequence[Any] = (), add_generation_prompt: bool = True
) -> list[Piece]:
    """Some templates take the arguments of a tool call as an object, others as its JSON text: the second is tried
    where the first is refused. Raises `PromptError`."""
    try:
        return chat.pieces(messages, tools, add_generation_prompt)
    except PromptError:
        as_texts = [_with_texts(message) for message in messages]
        if as_texts == messages:
            raise
        return chat.pieces(as_texts, tools, add_generation_prompt)


def _stand_in(reply: ChatMessage, mark: str) -> ChatMessage:
    """A reply with the same tool calls that ends with the mark, in the content or in the last call's arguments."""
    calls = reply.get("tool_calls") or []
    if not calls:
        return {"role": "assistant", "content": mark}
    functions = [{"name": call["function"]["name"], "arguments": {"mark": mark}} for call in calls]
    stand_ins = [call | {"function": function} for call, function in zip(calls, functions, strict=True)]
    return {"role": "assistant", "content": "", "tool_calls": stand_ins}


def _with_texts(message: ChatMessage) -> ChatMessage:
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}
