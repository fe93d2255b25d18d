"""Measures the demo policy on held-out problems: pass@1, greedy accuracy, and the share of mixed groups.

It samples with transformers only, so that it can serve as a reference for the services' sampling. The same seed and
number of threads give the same numbers on the same machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.common.tasks.arithmetic import Problem, held_out_problems, score

BATCH_PROBLEMS = 128
GROUP_SIZE = 4
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Evaluation:
    """Results between 0 and 1. A group is mixed if some, but not all, of its `GROUP_SIZE` completions are right."""

    num_problems: int
    samples: int
    pass_at_1: float
    greedy_accuracy: float
    mixed_share: float | None


def evaluate_policy(folder: Path, num_problems: int = 1024, samples: int = 4, *, seed: int = 0) -> Evaluation:
    """Evaluates on the first `num_problems` held-out problems, with `samples` completions each at temperature 1.

    `mixed_share` is None if `samples` is below `GROUP_SIZE`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    problems = list(islice(held_out_problems(), num_problems))
    if not 0 < num_problems <= len(problems):
        raise ValueError(f"num_problems is {num_problems}, but there are {len(problems)} held-out problems")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = torch.cat(list(_scores(model, tokenizer, problems, samples)))
    greedy = torch.cat(list(_scores(model, tokenizer, problems, None)))
    num_right = sampled[:, :GROUP_SIZE].sum(dim=1)
    mixed = ((num_right > 0) & (num_right < GROUP_SIZE)).double().mean().item()
    return Evaluation(
        num_problems=num_problems,
        samples=samples,
        pass_at_1=round(sampled.mean().item(), 4),
        greedy_accuracy=round(greedy.mean().item(), 4),
        mixed_share=round(mixed, 4) if samples >= GROUP_SIZE else None,
    )


def _scores(model: Any, tokenizer: Any, problems: list[Problem], samples: int | None) -> Iterator[torch.Tensor]:
    """Scores `(B, samples)` of each batch of problems; greedy with a single column if `samples` is None."""
    how: dict[str, Any] = (
        {"do_sample": False} if samples is None else {"do_sample": True, "num_return_sequences": samples, "top_k": 0}
    )
    for start in range(0, len(problems), BATCH_PROBLEMS):
        batch = problems[start : start + BATCH_PROBLEMS]
        chats = [problem.prompt.messages for problem in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            tokens = model.generate(**inputs, **how, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [problem.answer for problem in batch for _ in range(samples or 1)]
        rewards = [score(text, answer) for text, answer in zip(texts, answers, strict=True)]
        yield torch.tensor(rewards, dtype=torch.float64).view(len(batch), -1)
