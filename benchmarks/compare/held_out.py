"""Held-out accuracy of a policy: the same code for both sides, outside the timed part."""

import itertools
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.staleness.forced_staleness import ROWS_AT_ONCE, sample
from headrace.common.config import RunConfig
from headrace.common.tasks import Prompt, load_task
from headrace.common.tasks.arithmetic import score


def accuracy(policy: Path, config: RunConfig, num_problems: int) -> float:
    """The accuracy of one completion at temperature 1 for each of the first problems; deterministic on one machine."""
    disable_progress_bar()
    task = load_task(config.task.name, config.task.settings)
    prompts = itertools.islice(task.prompts("held_out", seed=config.seed, epoch=0), num_problems)
    problems = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    tokenizer = AutoTokenizer.from_pretrained(config.model.location)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [problems[first : first + ROWS_AT_ONCE] for first in range(0, num_problems, ROWS_AT_ONCE)]
        num_right = sum(_num_right(model, tokenizer, part, config.sampling.max_new_tokens) for part in parts)
    return num_right / num_problems


def _num_right(model: torch.nn.Module, tokenizer: object, problems: list[Prompt], max_new_tokens: int) -> float:
    prompts = [_tokens(tokenizer, problem) for problem in problems]
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    completions = [tokens for tokens, _ in sample(model, prompts, max_new_tokens, [end], drops_ended=True)]
    texts = [tokenizer.decode([token for token in tokens if token != end]) for tokens in completions]  # type: ignore[attr-defined]
    return sum(score(text, problem.reference["answer"]) for text, problem in zip(texts, problems, strict=True))


def _tokens(tokenizer: object, problem: Prompt) -> list[int]:
    messages = problem.messages
    found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)  # type: ignore[attr-defined]
    return found
