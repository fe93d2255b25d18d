"""Loading of a model's tokenizer, with the model's chat template or the configured one."""

from pathlib import Path
from typing import Any

from headrace.common.config import ModelConfig
from headrace.common.models.hub import from_pretrained_arguments


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer, with `model.chat_template` if given. Raises `ValueError` without a tokenizer or a template."""
    from transformers import AutoTokenizer  # seconds, and torch

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.location, **from_pretrained_arguments(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model.path!r} has no tokenizer that loads: {str(error).splitlines()[0]}") from error
    if model.chat_template is not None:
        tokenizer.chat_template = read_chat_template(model.chat_template)
    if not tokenizer.chat_template:
        raise ValueError(
            f"model {model.path!r} has no chat template; expected an instruction-tuned model, or a file of one as "
            "model.chat_template"
        )
    return tokenizer


def read_chat_template(path: str) -> str:
    """The file's text. Raises `ValueError` if it cannot be read or is empty."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model.chat_template {path!r}: expected a file with a Jinja template: {error}") from error
    if not text.strip():
        raise ValueError(f"model.chat_template {path!r} is empty; expected a Jinja template")
    return text
