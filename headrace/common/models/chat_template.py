"""Prompts as the model reads them: messages rendered by its chat template, then tokenized.

The learner's tickets and `headrace check` share this code. Only the template adds control tokens to a prompt: text that
looks like one inside a message (`<|im_end|>` in a data set) is tokenized as plain text. The date that some templates
write is always `TEMPLATE_DATE`, so that a ticket can be made again on another day. Transformers is imported on first
use.
"""

import difflib
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from headrace.common.config import ModelConfig
from headrace.common.models.control_tokens import CannotEscape, ControlTokens, Piece, tokens_of, unused_characters
from headrace.common.tasks import Prompt
from headrace.common.wire import Message, Ticket, WireError, check_ticket, decode_ticket, encode, one_line
from headrace.common.wire.json_checks import messages_problem

TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that Llama 3's template uses by default. Where a template reads `date_string`, another date can be set in
model.chat_template_settings."""
RESERVED = {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "strftime_now"}
"""The variables of a chat template that are not settings."""
QUESTION: Message = {"role": "user", "content": "3 + 4 = ?"}
"""Stands for a prompt where a template is tried."""


class PromptError(ValueError):
    """A prompt of the task cannot become a ticket; the text, one line, says why."""


class ChatTemplate:
    """Renders and tokenizes prompts. Raises `ValueError` if the template is invalid or lacks what is configured."""

    def __init__(self, tokenizer: Any, model: ModelConfig, system_prompt: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.settings = model.chat_template_settings
        self.system_prompt = system_prompt
        self.control = ControlTokens(tokenizer)
        self._check_settings(model.path)
        self._check_system_prompt(model.path)

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a prompt, up to the beginning of the answer. Raises `PromptError`."""
        return self._apply(self._with_system_prompt(messages))

    def encode(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The token ids of a prompt, up to the beginning of the answer. Raises `PromptError`."""
        whole = self._with_system_prompt(messages)
        if self.control.occur_in([*whole, *tools]):
            tokens = tokens_of(self.pieces(messages, tools))
        else:
            tokens = self.tokenizer.encode(self._apply(whole, tools), add_special_tokens=False)
        if not tokens:
            raise PromptError("the chat template renders it to nothing")
        return tokens

    def pieces(
        self, messages: Sequence[Any], tools: Sequence[Any] = (), add_generation_prompt: bool = True
    ) -> list[Piece]:
        """A conversation as control tokens and the texts between them. `messages` and `tools` are as in OpenAI's API.
        Raises `PromptError`, also if the tokenizer reports no offsets."""
        value = {"messages": self._with_system_prompt(messages), "tools": list(tools)}
        escaped, placeholders = self.control.escape(value)
        try:
            return self.control.encode(
                self._apply(**escaped, add_generation_prompt=add_generation_prompt), placeholders
            )
        except CannotEscape as error:
            raise PromptError(str(error)) from error

    def make_ticket(self, prompt: Prompt, **fields: Any) -> Ticket:
        """A valid ticket for the prompt; `fields` are the ticket's other fields.

        Without messages, an episode's environment opens the conversation, and the prompt is empty. Raises
        `PromptError` if the messages are not a list of mappings of texts, cannot be rendered or tokenized, or if
        the reference has values that JSON does not have. Numpy's scalars become Python's.
        """
        if not isinstance(prompt, Prompt):
            raise PromptError(f"expected a headrace.common.tasks.Prompt, found {_found(prompt)}")
        try:
            messages = msgspec.convert(prompt.messages, list[Message])
        except msgspec.ValidationError as error:
            raise PromptError(f"its messages are {_found(prompt.messages)}: {error}") from error
        if problem := messages_problem(messages):
            raise PromptError(f"it {problem}")
        if not isinstance(prompt.reference, dict):
            raise PromptError(f"its reference is {_found(prompt.reference)}, expected a dict")
        try:
            tokens = self.encode(messages, prompt.tools) if messages or fields.get("limits") is None else []
            reference = to_builtin_types(prompt.reference)
            ticket = Ticket(prompt_tokens=tokens, messages=messages, reference=reference, tools=prompt.tools, **fields)
            check_ticket(ticket)  # its error names the part that cannot be encoded
            return decode_ticket(encode(ticket))
        except (WireError, UnicodeEncodeError, OverflowError, RecursionError) as error:
            raise PromptError(_reason(error)) from error

    def _with_system_prompt(self, messages: Sequence[Message]) -> list[Message]:
        if self.system_prompt is None:
            return list(messages)
        if any(message.get("role") == "system" for message in messages):
            raise PromptError("it has a system message of its own; expected no task.system_prompt")
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def _apply(self, messages: list[Any], tools: Sequence[Any] = (), add_generation_prompt: bool = True) -> str:
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                strftime_now=TEMPLATE_DATE.strftime,
                **self.settings,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise PromptError(f"the model's chat template refuses it: {one_line(str(error))}") from error
        try:
            text.encode()  # a tokenizer's own error says less
        except UnicodeEncodeError as error:
            raise PromptError(_reason(error)) from error
        return text

    def end_of_turn(self) -> int | None:
        """The control token with which the template ends an answer; None if it writes none or rejects answers."""
        answer, _ = unused_characters("")
        turn: list[Message] = [QUESTION, {"role": "assistant", "content": answer}]
        try:
            text = self._apply(self._with_system_prompt(turn), add_generation_prompt=False)
            pieces = self.control.pieces(text)
        except (PromptError, CannotEscape):
            return None
        after = text.find(answer)
        return next((one.tokens[0] for one in pieces if one.is_control and one.start > after >= 0), None)

    def _check_settings(self, path: str) -> None:
        import jinja2

        try:
            known = _variables(self.tokenizer.get_chat_template()) - RESERVED - set(self.tokenizer.special_tokens_map)
        except (jinja2.TemplateError, ValueError) as error:
            raise ValueError(f"the chat template of {path!r} cannot be read: {one_line(str(error))}") from error
        for name in self.settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it reads {sorted(known) or 'no settings'}"
                raise ValueError(
                    f"model.chat_template_settings: the chat template of {path!r} does not read {name!r}; {hint}"
                )

    def _check_system_prompt(self, path: str) -> None:
        """Raises `ValueError` if the template rejects a system message or silently drops it."""
        if self.system_prompt is None:
            return
        instead = "expected the text in the task's own prompts, or a model.chat_template that takes it"
        try:
            rendered = self.render([QUESTION])
        except PromptError as error:
            raise ValueError(f"task.system_prompt: {path!r} takes no system message ({error}); {instead}") from error
        if self.system_prompt.strip() not in rendered:
            raise ValueError(f"task.system_prompt: the chat template of {path!r} leaves it out; {instead}")


def stop_token_ids(chat: ChatTemplate, generation_config: Any) -> list[int]:
    """The tokens that end an answer, ascending.

    They are the end tokens of the generation config and of the tokenizer, at both of which the engine stops, and the
    template's end of a turn, which some models name in neither (Qwen2.5's base models).
    """
    given = getattr(generation_config, "eos_token_id", None)
    every = [*(given if isinstance(given, list) else [given]), chat.tokenizer.eos_token_id, chat.end_of_turn()]
    found = {token for token in every if token is not None}
    if not found:
        raise ValueError("neither the generation config nor the tokenizer nor the chat template names an end token")
    return sorted(found)


def to_builtin_types(value: Any) -> Any:
    """The value with Python scalars in place of numpy's, and lists in place of tuples."""
    import numpy as np

    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: to_builtin_types(inner) for key, inner in value.items()}
    return [to_builtin_types(inner) for inner in value] if type(value) in (list, tuple) else value


def _variables(template: str) -> set[str]:
    """The variables that a chat template reads, without the functions that every template has."""
    from jinja2 import meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    return set(meta.find_undeclared_variables(environment.parse(template))) - set(environment.globals)


def _found(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:79] + '…'}"


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"it has half of a character ({error.object[error.start]!r}, a single surrogate), which is not text"
    return one_line(str(error))
