"""Makes tickets of the first prompts of each split as the learner does, in a process of its own.

    python -m headrace.launcher.check.prompt_trial OUTPUT NUM_PROMPTS < config.json
    (headrace/launcher/check/trial.py)

So the launcher loads neither the task, which is foreign code, nor the tokenizer.
"""

import itertools
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec

from headrace.common.config import RunConfig
from headrace.common.environments.limits import episode_limits
from headrace.common.models.chat_template import ChatTemplate, PromptError
from headrace.common.models.context_length import context_tokens, load_model_config
from headrace.common.models.hub import is_hub_name
from headrace.common.models.prompt_cost import unshared_prompt_note
from headrace.common.models.template_loading import bridge_of, torch_kept_out
from headrace.common.models.template_probe import TemplateProbe, probe_template
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.preflight.environment import check_model_context, check_template
from headrace.common.preflight.recipe import UnavailableHere, one_line
from headrace.common.preflight.task import SPLITS, check_task, checked_prompts, load_checked_task
from headrace.common.tasks import BadRow, Prompt, Split, has_rollout
from headrace.common.wire import Limits, Sampling, decode_ticket, encode
from headrace.launcher.estimates.duration import measure_flops


class SplitTrial(msgspec.Struct):
    """The results of the first prompts of a split."""

    lengths: list[int] = []
    """Length in tokens of each prompt that became a ticket."""
    refused: list[str] = []
    """The reasons why prompts did not."""
    ticket: bytes = b""
    """The first ticket, encoded."""


class TaskTrial(msgspec.Struct):
    problem: str = ""
    is_only_here: bool = False
    """The problem may not exist on another machine."""
    context: int = 0
    """Longest sequence that the engine accepts, in tokens; of a task with `rollout`, longest conversation."""
    min_new_tokens: int = 1
    """Tokens that a prompt must leave room for in the context."""
    has_rollout: bool = False
    splits: dict[str, SplitTrial] = {}
    cost: str = ""
    """The cost of prompts that the model cannot share within a group; empty if it can."""
    template: TemplateProbe | None = None
    """What the chat template does with several turns."""
    flops: float = 0.0
    """Floating-point operations a second of one thread of this machine, in float32."""


def main() -> int:
    output, num_prompts = sys.argv[1:]
    try:
        found = try_prompts(RunConfig.model_validate_json(sys.stdin.readline()), int(num_prompts))
    except ValueError as problem:
        found = TaskTrial(one_line(problem), is_only_here=isinstance(problem, UnavailableHere))
    Path(output).write_bytes(msgspec.msgpack.encode(found))
    return 0


def try_prompts(config: RunConfig, num_prompts: int) -> TaskTrial:
    """With `num_prompts` 0 (the model is missing), tries only the task.

    Raises `ValueError`, or its subclass `UnavailableHere`, if a split has no prompts or none can become a ticket.
    """
    if num_prompts == 0:
        check_task(config)
        return TaskTrial()
    task = load_checked_task(config)
    chat, model_config = _load(config)
    context = context_tokens(model_config, config.generation.engine.context_tokens)
    found = TaskTrial(context=context, flops=measure_flops(), template=probe_template(bridge_of(chat, config.model)))
    found.min_new_tokens = config.sampling.max_new_tokens
    limits = None
    if has_rollout(task):
        check_model_context(config, context)
        limits = episode_limits(config, context)
        found.has_rollout, found.context, found.min_new_tokens = True, limits.max_context_tokens, 1
    for split in SPLITS:
        count = num_prompts if split == "train" else min(num_prompts, config.evaluation.num_prompts)
        prompts = itertools.islice(checked_prompts(task, config, split), count)
        trial = found.splits[split] = SplitTrial()
        for row, prompt in enumerate(prompts):
            _try(chat, config, split, row, prompt, trial, limits)
        if not trial.lengths:
            why = trial.refused[0] if trial.refused else f"it has no {split} prompts"
            raise ValueError(f"task {config.task.name!r}: {why}")
    if has_rollout(task) and found.template is not None:
        tickets = [decode_ticket(trial.ticket) for trial in found.splits.values()]
        check_template(config, found.template, has_tools=any(ticket.tools for ticket in tickets))
    typical = int(statistics.median(found.splits["train"].lengths))
    found.cost = unshared_prompt_note(model_config, config.actor.group_size, typical, config.learner.groups_per_step)
    return found


def _load(config: RunConfig) -> tuple[Any, Any]:
    """The chat template with the tokenizer, and the model's configuration."""
    with torch_kept_out(config.model):
        try:
            chat = ChatTemplate(load_tokenizer(config.model), config.model, config.task.system_prompt)
            return chat, load_model_config(config.model)
        except ValueError as error:
            if is_hub_name(config.model.path) and os.environ.get("HF_HUB_OFFLINE"):
                raise UnavailableHere(f"the prompts were not tried: {one_line(error)}") from error
            raise


def _try(
    chat: Any,
    config: RunConfig,
    split: Split,
    row: int,
    prompt: Prompt | BadRow,
    trial: SplitTrial,
    limits: Limits | None,
) -> None:
    is_train = split == "train"
    if isinstance(prompt, BadRow):
        trial.refused.append(f"{split} prompt {row}: {prompt.reason}")
        return
    try:
        ticket = chat.make_ticket(
            prompt,
            id=f"0-{row}" if is_train else f"eval-1-{row}",
            kind="train" if is_train else "eval",
            num_completions=config.actor.group_size if is_train else config.evaluation.completions_per_prompt,
            sampling=Sampling(config.sampling.temperature, config.sampling.max_new_tokens, []),
            min_weight_version=1,
            limits=limits,
        )
    except PromptError as error:
        trial.refused.append(f"{split} prompt {row}: {error}")
        return
    trial.lengths.append(len(ticket.prompt_tokens))
    trial.ticket = trial.ticket or encode(ticket)


if __name__ == "__main__":
    sys.exit(main())
