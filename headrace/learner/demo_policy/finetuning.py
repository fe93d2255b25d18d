"""Supervised finetuning on worked answers: the cross-entropy of completion tokens, with AdamW."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from headrace.common.tasks import Prompt

ADAM_BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
IGNORED_LABEL = -100
"""Label of tokens that are not in the loss."""


def finetune(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterator[list[tuple[Prompt, str]]],
    num_steps: int,
    learning_rate: float,
) -> Iterator[float]:
    """Yields the loss of each step; a step, on one batch of prompts and worked answers, is taken per loss requested.

    `learning_rate` is the rate of the first step; it falls linearly to zero at `num_steps`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
    for step, batch in enumerate(islice(batches, num_steps)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        loss = completion_loss(model, *encode(tokenizer, batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        yield loss.item()


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[tuple[Prompt, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (B, T) int64, padded on the right; only completion tokens have labels."""
    prompts = [
        tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        for prompt, _ in batch
    ]
    completions = [worked_answer + str(tokenizer.eos_token) for _, worked_answer in batch]
    rows = list(zip(tokenizer(prompts).input_ids, tokenizer(completions).input_ids, strict=True))
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def completion_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens. Padding comes last, so causal attention needs no other mask."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    labelled = targets != IGNORED_LABEL
    return cross_entropy(model.lm_head(hidden[labelled]), targets[labelled])
