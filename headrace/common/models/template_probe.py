"""What a model's chat template does with a conversation of several turns, tried before anything relies on it.

Three replies are rendered (a plain one, one with reasoning, one that calls a tool), and what may follow them. Known
then: whether the bridge behind a reply is what the whole rendering has there, and whether the template leaves earlier
replies as they were sampled.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec

from headrace.common.models.bridge import Bridge, ChatMessage, render_calls
from headrace.common.models.chat_template import QUESTION, PromptError
from headrace.common.models.control_tokens import Piece, tokens_of

History = Literal["kept", "rewritten", "refused", "not rendered"]
"""What a template does with an earlier reply, the best first; `not rendered` if it leaves the reply out even where it
is the last."""
TOOL_NAME = "add_numbers"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"first": {"type": "number"}, "second": {"type": "number"}},
            "required": ["first", "second"],
        },
    },
}
ANSWER, REASONING, ARGUMENT = "The sum is seven.", "Three and four.", "three"
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Templates have no common name for the field that holds the reasoning."""
IDS = ("call00001", "call00002")
"""Nine letters and digits, as Mistral's templates ask."""
FOLLOW_UP: ChatMessage = {"role": "user", "content": "And 5 + 6?"}


class TemplateProbe(msgspec.Struct, frozen=True):
    """What becomes of a reply once another message follows it."""

    after_user: History
    reasoning_after_user: History
    after_tool: History
    """Of a reply that calls a tool, with reasoning or without, once the tool's answer follows."""
    problems: list[str] = []
    """What the template refuses, and where the bridge behind a reply is wrong; one line for each."""


def probe_template(bridge: Bridge) -> TemplateProbe:
    """Tries the template on short conversations; takes milliseconds."""
    case = _Case(bridge)
    after_user = case.history("user message", [], [FOLLOW_UP])
    reasoning = case.best("user message after reasoning", [], [FOLLOW_UP], is_reasoned=True)
    after_tool = _after_tool(bridge, case.problems)
    return TemplateProbe(after_user, reasoning, after_tool, list(dict.fromkeys(case.problems)))


def _after_tool(bridge: Bridge, problems: list[str]) -> History:
    case = _Case(bridge, [TOOL])
    try:
        prompt = bridge.chat.pieces([QUESTION], [TOOL])
    except PromptError:
        return "refused"
    if not _shows(prompt, [TOOL_NAME]):
        return "not rendered"
    answers = [{"role": "tool", "tool_call_id": id_, "name": TOOL_NAME, "content": "7"} for id_ in IDS]
    found = case.best("tool message", IDS[:1], answers[:1])
    if found == "kept":
        case.best("two tool messages", IDS, answers)
        case.best("tool message and user message", IDS[:1], [answers[0], FOLLOW_UP])
    problems += case.problems
    return found


class _Case:
    """Replies with these tools offered."""

    def __init__(self, bridge: Bridge, tools: Sequence[Any] = ()) -> None:
        self.bridge, self.tools = bridge, tools
        self.problems: list[str] = []

    def best(
        self, name: str, call_ids: Sequence[str], following: Sequence[ChatMessage], is_reasoned: bool = False
    ) -> History:
        """Over the ways to say the reasoning of a reply; without reasoning too, unless `is_reasoned`."""
        fields = [*([] if is_reasoned else [None]), *REASONING_FIELDS]
        num_known = len(self.problems)
        found = []
        for field in fields:
            found.append(self.history(name, call_ids, following, field))
            if found[-1] == "kept":
                del self.problems[num_known:]
                break
        return next((one for one in get_args(History) if one in found), "not rendered")

    def history(
        self,
        name: str,
        call_ids: Sequence[str],
        following: Sequence[ChatMessage],
        reasoning_field: str | None = None,
    ) -> History:
        chat, tools = self.bridge.chat, self.tools
        reply, texts = _reply(call_ids, reasoning_field)
        try:
            prompt = tokens_of(render_calls(chat, [QUESTION], tools))
            alone = render_calls(chat, [QUESTION, reply], tools, add_generation_prompt=False)
            if not _shows(alone, texts):
                return "not rendered"
            whole = render_calls(chat, [QUESTION, reply, *following], tools)
            end = whole[self.bridge.end_of_reply(whole, texts[-1])].tokens[0]
            bridge = self.bridge.tokens(reply, end, following, tools)
        except PromptError as error:
            self.problems.append(f"{name}: {error}")
            return "refused"
        tokens = tokens_of(whole)
        if tokens[-len(bridge) :] != bridge:
            self.problems.append(f"{name}: the bridge is not what the whole conversation has there")
        is_kept = tokens[: len(prompt)] == prompt and _shows(whole, texts) and end in self.bridge.stop_token_ids
        return "kept" if is_kept else "rewritten"


def _reply(call_ids: Sequence[str], reasoning_field: str | None) -> tuple[ChatMessage, list[str]]:
    """A reply, and its texts in the order in which a model samples them."""
    reply: ChatMessage = {"role": "assistant", "content": "" if call_ids else ANSWER}
    texts = [ARGUMENT] * len(call_ids) or [ANSWER]
    if call_ids:
        function = {"name": TOOL_NAME, "arguments": {"first": ARGUMENT, "second": 4}}
        reply["tool_calls"] = [{"id": id_, "type": "function", "function": function} for id_ in call_ids]
    if reasoning_field is None:
        return reply, texts
    return reply | {reasoning_field: REASONING}, [REASONING, *texts]


def _shows(pieces: Sequence[Piece], texts: Sequence[str]) -> bool:
    """Whether the texts stand in the rendering in their order."""
    rendered, at = "".join(piece.text for piece in pieces), 0
    for text in texts:
        at = rendered.find(text, at)
        if at < 0:
            return False
        at += len(text)
    return True
