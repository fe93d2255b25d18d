"""Supervised finetuning on conversations: the cross-entropy of the assistant's tokens, with AdamW."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from headrace.learner.demo_policy.conversations import Conversation
from headrace.learner.demo_policy.tokenizer import ASSISTANT

ADAM_BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
IGNORED_LABEL = -100
"""Label of tokens that are not in the loss."""


def finetune(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterator[Sequence[Conversation]],
    num_steps: int,
    learning_rate: float,
) -> Iterator[float]:
    """Yields the loss of each step; a step, on one batch, is taken per loss requested.

    `learning_rate` is the rate of the first step; it falls linearly to zero at `num_steps`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
    for step, batch in enumerate(islice(batches, num_steps)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        loss = reply_loss(model, *encode(tokenizer, batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        yield loss.item()


def encode(tokenizer: PreTrainedTokenizerFast, batch: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (B, T) int64, padded on the right; only the assistant's tokens have labels."""
    texts = [tokenizer.apply_chat_template(one.messages, tools=one.tools or None, tokenize=False) for one in batch]
    rows = tokenizer(texts).input_ids
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids, torch.where(_is_assistants(tokenizer, ids), ids, IGNORED_LABEL)


def _is_assistants(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> torch.Tensor:
    """For each token, (B, T) bool, whether it stands between the assistant's role token and the next end, inclusive."""
    starts = ids == tokenizer.convert_tokens_to_ids(ASSISTANT)
    ends = ids == tokenizer.eos_token_id
    num_ends_before = ends.cumsum(1) - ends.long()
    ends_at_start = torch.where(starts, num_ends_before, -1).cummax(1).values
    inside: torch.Tensor = (ends_at_start == num_ends_before) & ~starts
    return inside


def reply_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens. Padding comes last, so causal attention needs no other mask."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    labelled = targets != IGNORED_LABEL
    return cross_entropy(model.lm_head(hidden[labelled]), targets[labelled])
