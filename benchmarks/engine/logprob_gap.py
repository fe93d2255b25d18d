"""The gap between reported behaviour log-probabilities and an exact forward pass by transformers in float32."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.generation.engine.completions import Completion

Prompted = list[tuple[list[int], Completion]]
"""Prompt tokens, and a completion of them at temperature 1."""
MAX_COMPARED = 8
"""The number of completions to compare: the first ones during which a swap happened. Of each, the last `MAX_SPANS`
spans count."""
MAX_SPANS = 4


def gaps(completions: Prompted, folders: dict[int, Path], config: Path) -> dict[str, Any]:
    """Gaps of tokens after a swap: exact minus behaviour log-probability, by the version of the token's span.

    `folders` has the weights of each version, `config` the model's configuration. A token's importance weight is
    exp(gap); a sequence's is the exponential of its mean gap over the compared tokens.
    """
    swapped = [(prompt, c) for prompt, c in completions if len(c.version_spans) > 1][:MAX_COMPARED]
    torch.set_num_threads(1)
    by_version = defaultdict(list)
    for prompt, completion in swapped:
        for span in completion.version_spans[1:][-MAX_SPANS:]:
            by_version[span.version].append((prompt, completion, span))
    found: list[np.ndarray] = []
    of_sequence: dict[int, list[np.ndarray]] = defaultdict(list)
    for version, spans in by_version.items():
        model = exact_model(folders[version], config)
        for prompt, completion, span in spans:
            exact = exact_logprobs(model, prompt, completion.tokens)
            gap = (exact - completion.behaviour_logprobs)[span.start : span.end]
            found.append(gap)
            of_sequence[id(completion)].append(gap)
    if not found:
        return {"num_compared": 0}
    gap, sequences = np.concatenate(found), np.array([np.concatenate(parts).mean() for parts in of_sequence.values()])
    return {
        "num_compared": len(gap),
        "gap_mean": float(np.abs(gap).mean()),
        "gap_max": float(np.abs(gap).max()),
        "token_weight_deviation_mean": float(np.abs(np.exp(gap) - 1).mean()),
        "token_weight_min_max": [float(np.exp(gap).min()), float(np.exp(gap).max())],
        "sequence_weight_deviation_max": float(np.abs(np.exp(sequences) - 1).max()),
    }


def exact_model(folder: Path, config: Path) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).float()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # the head is tied
    return model.eval()


def exact_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Log-probabilities `(len(tokens),)` at temperature 1."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    found: np.ndarray = chosen.numpy()
    return found
