"""Makes the tickets of `headrace try`, one for each of the first prompts of a split, in a process of its own.

    python -m headrace.launcher.trial.tickets OUTPUT SPLIT NUM IS_REMOTE < config.json

So the launcher loads neither the task, which is foreign code, nor the tokenizer. A remote model needs no tokenizer.
"""

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from headrace.common.config import RunConfig
from headrace.common.environments.limits import episode_limits
from headrace.common.models.bridge import Bridge
from headrace.common.models.chat_template import ChatTemplate, PromptError
from headrace.common.models.context_length import context_tokens, load_model_config
from headrace.common.models.template_loading import bridge_of, torch_kept_out
from headrace.common.models.template_probe import probe_template
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.preflight.environment import check_model_context, check_template
from headrace.common.preflight.recipe import one_line
from headrace.common.preflight.task import checked_prompts, load_checked_task
from headrace.common.tasks import BadRow, Prompt, Split, has_rollout
from headrace.common.wire import MIN_TEMPERATURE, Limits, Sampling, Ticket, encode
from headrace.common.wire.structs import MAX_SEQUENCE_TOKENS

UNKNOWN_TOKENS = [0]
"""The prompt of a ticket for a remote model, which is sent the messages."""


class FirstTickets(msgspec.Struct):
    problem: str = ""
    has_rollout: bool = False
    tickets: list[bytes] = []
    """Encoded."""
    refused: list[str] = []
    """The reasons why prompts did not become tickets."""


class _Model(NamedTuple):
    chat: ChatTemplate
    stop_token_ids: list[int]
    context: int
    """Longest sequence, in tokens."""
    bridge: Bridge | None = None


class _Untokenized(ChatTemplate):
    """Makes tickets without the model's files."""

    def __init__(self) -> None:
        """There is nothing to load."""

    def encode(self, messages: Any, tools: Any = ()) -> list[int]:
        return UNKNOWN_TOKENS


def main() -> int:
    output, split, num, is_remote = sys.argv[1:]
    config = RunConfig.model_validate_json(sys.stdin.readline())
    try:
        found = first_tickets(config, cast(Split, split), int(num), is_remote == "True")
    except ValueError as problem:
        found = FirstTickets(one_line(problem))
    Path(output).write_bytes(msgspec.msgpack.encode(found))
    return 0


def first_tickets(config: RunConfig, split: Split, num: int, is_remote: bool) -> FirstTickets:
    """Raises `ValueError` if none of the prompts can become a ticket, or the model does not suit the task."""
    task = load_checked_task(config)
    found = FirstTickets(has_rollout=has_rollout(task))
    model = _Model(_Untokenized(), [], MAX_SEQUENCE_TOKENS) if is_remote else _load_model(config)
    limits = episode_limits(config, model.context) if found.has_rollout else None
    sampling = _sampling(config, split, model.stop_token_ids)
    has_tools = False
    for row, prompt in enumerate(itertools.islice(checked_prompts(task, config, split), num)):
        try:
            ticket = _ticket(model.chat, prompt, f"{split}-{row}", split, sampling, limits)
        except PromptError as error:
            found.refused.append(f"{split} prompt {row}: {error}")
            continue
        has_tools = has_tools or bool(ticket.tools)
        found.tickets.append(encode(ticket))
    if not found.tickets:
        why = found.refused[0] if found.refused else f"it has no {split} prompts"
        raise ValueError(f"task {config.task.name!r}: {why}")
    if model.bridge is not None and found.has_rollout:
        check_model_context(config, model.context)
        check_template(config, probe_template(model.bridge), has_tools)
    return found


def _load_model(config: RunConfig) -> _Model:
    with torch_kept_out(config.model):
        chat = ChatTemplate(load_tokenizer(config.model), config.model, config.task.system_prompt)
        bridge = bridge_of(chat, config.model)
        context = context_tokens(load_model_config(config.model), config.generation.engine.context_tokens)
        return _Model(chat, sorted(bridge.stop_token_ids), context, bridge)


def _sampling(config: RunConfig, split: Split, stop_token_ids: list[int]) -> Sampling:
    """As that of the learner's tickets."""
    settings, temperature = config.sampling, config.sampling.temperature
    if split == "held_out" and config.evaluation.temperature is not None:
        temperature = max(config.evaluation.temperature, MIN_TEMPERATURE)
    return Sampling(temperature, settings.max_new_tokens, stop_token_ids, settings.stop)


def _ticket(
    chat: ChatTemplate, prompt: Prompt | BadRow, name: str, split: Split, sampling: Sampling, limits: Limits | None
) -> Ticket:
    """Asks for one rollout. Raises `PromptError`."""
    if isinstance(prompt, BadRow):
        raise PromptError(prompt.reason)
    return chat.make_ticket(
        prompt,
        id=name,
        kind="train" if split == "train" else "eval",
        num_completions=1,
        sampling=sampling,
        min_weight_version=0,
        limits=limits,
    )


if __name__ == "__main__":
    sys.exit(main())
