"""Tokens of what is not sampled: whole prompts, and bridges behind replies, by the model's chat template."""

from collections.abc import Sequence
from typing import Any, Literal

from headrace.common.models.bridge import Bridge, render_calls
from headrace.common.models.chat_template import QUESTION, PromptError
from headrace.common.models.control_tokens import tokens_of
from headrace.common.models.template_probe import probe_template
from headrace.common.wire import Message
from headrace.generation.gateway.errors import BadRequest


class Rendering:
    """Of one model. `bridge.chat` has no system prompt: `system_prompt` stands before every conversation without a
    system message. `history`: whether a conversation goes on where the template would change earlier replies."""

    def __init__(
        self, bridge: Bridge, history: Literal["template", "keep"] = "template", system_prompt: str | None = None
    ) -> None:
        self._bridge = bridge
        self._history = history
        self._system: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        self.probe = probe_template(bridge)
        self.opening = self._opening()
        """What the template writes before a reply, such as `<|im_start|>assistant\n<think>\n`."""

    def whole(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[int]:
        """A conversation up to the beginning of the next reply. Raises `BadRequest` if the template refuses it."""
        has_system = any(message["role"] == "system" for message in messages)
        try:
            tokens = tokens_of(
                render_calls(self._bridge.chat, [*([] if has_system else self._system), *messages], tools)
            )
        except PromptError as error:
            raise BadRequest(f"messages: {error}") from error
        if not tokens:
            raise BadRequest("messages: the chat template renders them to nothing")
        return tokens

    def behind(
        self, reply: Message, last_token: int, messages: Sequence[Message], tools: Sequence[Any]
    ) -> list[int] | None:
        """The bridge from a reply to the next; None if the template refuses the messages there."""
        try:
            return self._bridge.tokens(reply, last_token, messages, tools)
        except PromptError:
            return None

    def keeps_history(self, messages: Sequence[Message], is_reasoned: bool) -> bool:
        """Whether earlier replies stay as they were sampled when these messages follow; `is_reasoned`: one of the
        replies has reasoning."""
        if self._history == "keep":
            return True
        if all(message["role"] == "tool" for message in messages):
            return self.probe.after_tool == "kept"
        return self.probe.after_user == "kept" and (not is_reasoned or self.probe.reasoning_after_user == "kept")

    def _opening(self) -> str:
        """Empty if the template refuses a single question."""
        try:
            prompt, opened = (
                "".join(piece.text for piece in self._bridge.chat.pieces([QUESTION], add_generation_prompt=is_opened))
                for is_opened in (False, True)
            )
        except PromptError:
            return ""
        return opened.removeprefix(prompt) if opened.startswith(prompt) else ""
