"""The longest sequence that the engine accepts, prompt and completion together.

The rule is SGLang's (`get_context_length` and `_validate_one_request`, 0.5.23), so that a prompt that SGLang would
reject is found before its ticket is issued.
"""

from typing import Any

from headrace.common.config import ModelConfig
from headrace.common.models.hub import from_pretrained_arguments

LENGTH_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")
"""Keys of config.json; the first one present applies."""
DEFAULT_LENGTH = 2048


def load_model_config(model: ModelConfig) -> Any:
    """The model's configuration as transformers reads it, with its defaults; of a multimodal model, the text part.

    Raises `ValueError` if it cannot be loaded.
    """
    from transformers import AutoConfig  # seconds, and torch

    try:
        return AutoConfig.from_pretrained(model.location, **from_pretrained_arguments(model)).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model.path!r}: no configuration that loads: {str(error).splitlines()[0]}") from error


def context_tokens(model_config: Any, asked: int | None = None) -> int:
    """The context length in tokens. `model_config` is as transformers reads it; `asked` is the configured length."""
    if asked is not None:
        return asked
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    scaling = getattr(model_config, "rope_scaling", None) or {}
    is_in_length = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    factor = 1 if is_in_length else scaling.get("factor", 1)
    lengths = (getattr(model_config, key, None) for key in LENGTH_KEYS)
    return next((int(factor * length) for length in lengths if length is not None), DEFAULT_LENGTH)


def fits_context(num_prompt_tokens: int, max_new_tokens: int, context: int) -> bool:
    """Whether the engine accepts a request of this size."""
    return num_prompt_tokens + max_new_tokens <= context
