"""Models on the Hugging Face hub: the form of their names, and the files that are downloaded.

Downloaded are the weights once, as safetensors, and the files beside them. The same weights in other formats are not
(`original/*.pth` of Llama, `consolidated.safetensors` of Mistral, `metal/` of gpt-oss), nor is code without
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
"""Files in subfolders belong to another format or another model."""


def is_hub_name(path: str) -> bool:
    """Whether `path` is a hub name, such as `Qwen/Qwen3-0.6B`, and not a path on this machine."""
    local = Path(path)
    is_named = HUB_NAME.fullmatch(path) is not None and not path.startswith(".")
    return is_named and not local.exists() and not local.parent.exists()


def from_pretrained_arguments(model: ModelConfig) -> dict[str, str | bool]:
    """Keyword arguments of transformers' `from_pretrained`; without trust_remote_code it would ask at the terminal."""
    revision = {} if model.revision is None else {"revision": model.revision}
    return {"trust_remote_code": model.trust_remote_code, **revision}


def download(model: ModelConfig, has_weights: bool = True) -> Path:
    """Downloads the model's missing files and returns the folder that holds all of them.

    Raises the exceptions of `huggingface_hub`.
    """
    from huggingface_hub import snapshot_download

    wanted = SMALL_FILES + (WEIGHTS + TOKENIZER_FILES) * has_weights + CODE * model.trust_remote_code
    found: Any = snapshot_download(model.path, revision=model.revision, allow_patterns=wanted, ignore_patterns=UNWANTED)
    return Path(found)
