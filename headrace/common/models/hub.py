"""Models on the Hugging Face hub: what passes for a name there, and which files of a model are wanted.

Only what is read: the weights once, as safetensors, and what stands beside them. Not the same weights in the formats of
others (`original/*.pth` of Llama, `consolidated.safetensors` of Mistral, `metal/` of gpt-oss), and no code without
model.trust_remote_code.
"""

import re
from pathlib import Path
from typing import Any

from headrace.common.config import ModelConfig

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SMALL_FILES = ["*.json", "*.jinja"]
TOKENIZER_FILES = ["*.txt", "*.model", "*.tiktoken"]
WEIGHTS = ["*.safetensors"]
CODE = ["*.py"]
UNWANTED = ["*/*", "consolidated*"]
"""A folder's files are another format's, or another model."""


def is_hub_name(path: str) -> bool:
    """Such as `Qwen/Qwen3-0.6B`, and no folder here could be meant."""
    local = Path(path)
    is_named = HUB_NAME.fullmatch(path) is not None and not path.startswith(".")
    return is_named and not local.exists() and not local.parent.exists()


def from_pretrained_arguments(model: ModelConfig) -> dict[str, str | bool]:
    """Keyword arguments of transformers' `from_pretrained`. Without a word on code it would ask at the terminal."""
    revision = {} if model.revision is None else {"revision": model.revision}
    return {"trust_remote_code": model.trust_remote_code, **revision}


def download(model: ModelConfig, has_weights: bool = True) -> Path:
    """The folder on this machine with the model's files, of which those not here yet are fetched first. Raises what
    `huggingface_hub` raises."""
    from huggingface_hub import snapshot_download

    wanted = SMALL_FILES + (WEIGHTS + TOKENIZER_FILES) * has_weights + CODE * model.trust_remote_code
    found: Any = snapshot_download(model.path, revision=model.revision, allow_patterns=wanted, ignore_patterns=UNWANTED)
    return Path(found)
