"""Loads a model's chat template and what ends its replies, without torch where that is possible.

Transformers' tokenizers and settings do not need torch; with it, the import takes three times as long.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from headrace.common.config import ModelConfig
from headrace.common.models.bridge import Bridge
from headrace.common.models.chat_template import ChatTemplate, stop_token_ids
from headrace.common.models.tokenizer import load_tokenizer


@contextlib.contextmanager
def torch_kept_out(model: ModelConfig) -> Iterator[None]:
    """Transformers, if first imported within the block, finds no torch; unless the model has code of its own."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # otherwise it warns that torch is missing
    is_imported = not sys.modules.keys().isdisjoint({"torch", "transformers"})
    is_kept_out = not is_imported and not model.trust_remote_code
    if is_kept_out:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if is_kept_out:
            del sys.modules["torch"]


def load_bridge(model: ModelConfig) -> Bridge:
    """Without a system prompt. Raises `ValueError` if there is no usable chat template, or no end token is known."""
    with torch_kept_out(model):
        return bridge_of(ChatTemplate(load_tokenizer(model), model), model)


def bridge_of(chat: Any, model: ModelConfig) -> Bridge:
    """Raises `ValueError` if no end token is known."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(model.location, revision=model.revision)
    except OSError:
        generation = None
    return Bridge(chat, stop_token_ids(chat, generation))
