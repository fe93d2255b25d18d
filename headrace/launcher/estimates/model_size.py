"""The size of a model: its number of parameters, from the headers of its files, else from its config.json.

A safetensors header has every tensor's shape, for any architecture. Without the files, parameters are counted exactly
for the dense decoders Qwen2, Qwen3 and Llama. The weights themselves are not read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.common.config import RunConfig
from headrace.common.preflight.recipe import model_files, read_model_file

DENSE = ("llama", "qwen2", "qwen3")
INDEX_FILE = "model.safetensors.index.json"
MODEL_FILE = "model.safetensors"
HEAD = "lm_head.weight"
MAX_HEADER_BYTES = 100 << 20
"""The limit of the safetensors library."""


@dataclass(frozen=True)
class Shape:
    """The fields of a config.json that determine sizes. In a mixture of experts `intermediate` is one token's width."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_tied: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    counted: int | None = None
    """Number of parameters in the model's files, each tensor once."""

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Number of parameters, each tensor once: a tied head is the embedding."""
        return self.counted or self.layers * self._layer + self.num_root_parameters

    @property
    def num_root_parameters(self) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return self.hidden + self.vocab * self.hidden * (1 if self.is_tied else 2)

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer, with all experts."""
        return (self.num_parameters - self.num_root_parameters) // self.layers

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token is multiplied with: no embedding, and only the experts that the token uses."""
        return self.layers * self._layer + self.hidden * (1 + self.vocab)

    @property
    def _layer(self) -> int:
        attention = 2 * self.hidden * (self.query + self.key_value)
        attention += self.has_qkv_bias * (self.query + 2 * self.key_value) + self.has_output_bias * self.hidden
        attention += self.has_qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden * self.intermediate + self.has_mlp_bias * (2 * self.intermediate + self.hidden)
        return attention + mlp + 2 * self.hidden


def shape_of(config: RunConfig) -> Shape:
    """The shape of the run's model. Raises `ValueError` if its files are missing or its size is unknown."""
    model = config.model
    folder = model_files(model.location, model.revision)
    return shape_in(folder, read_model_file(model.location, folder / "config.json"))


def shape_in(folder: Path, model_config: dict[str, Any]) -> Shape:
    """The shape of the model in a folder, with or without weights. Raises `ValueError` if its size is unknown."""
    is_tied = bool(
        _text_config(model_config).get("tie_word_embeddings", model_config.get("tie_word_embeddings", False))
    )
    return read_shape(model_config, count_parameters(folder, is_tied))


def read_shape(model_config: dict[str, Any], counted: int | None = None) -> Shape:
    """Raises `ValueError` if a size is missing or, without `counted`, the architecture is not in `DENSE`."""
    text = _text_config(model_config)
    kind = text.get("model_type")
    if kind not in DENSE and counted is None:
        raise ValueError(f"model_type is {kind!r}: without the model's files only {', '.join(DENSE)} are counted")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for size in sizes:
        if not isinstance(text.get(size), int) or text[size] < 1:
            raise ValueError(f"config.json: {size} is {text.get(size)!r}, expected a positive number")
    hidden, layers, heads, vocab = (text[size] for size in sizes)
    attention_bias = bool(text.get("attention_bias", False))
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
        intermediate=_intermediate(text),
        vocab=vocab,
        is_tied=bool(text.get("tie_word_embeddings", model_config.get("tie_word_embeddings", False))),
        has_qkv_bias=kind == "qwen2" or attention_bias,
        has_output_bias=kind != "qwen2" and attention_bias,
        has_mlp_bias=kind == "llama" and bool(text.get("mlp_bias", False)),
        has_qk_norm=str(kind).startswith("qwen3"),
        counted=counted,
    )


def _text_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """The text part of a multimodal model's configuration; else the configuration itself."""
    inner: dict[str, Any] = model_config.get("text_config") or model_config
    return inner


def _intermediate(text: dict[str, Any]) -> int:
    """The width of the MLP that one token uses."""
    width = text.get("intermediate_size")
    if expert := text.get("moe_intermediate_size"):
        width = expert * (text.get("num_experts_per_tok") or 1) + (text.get("shared_expert_intermediate_size") or 0)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"config.json: intermediate_size is {width!r}, expected a positive number")
    return width


def count_parameters(folder: Path, is_tied: bool) -> int | None:
    """The number of parameters by the headers of the folder's safetensors files; None if files are missing.

    A head that is tied to the embedding counts once, whether or not it is in the files. Raises `ValueError` naming an
    invalid file.
    """
    index = folder / INDEX_FILE
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [MODEL_FILE]
    if not all((folder / name).is_file() for name in names):
        return None
    sizes: dict[str, int] = {}
    for name in names:
        sizes |= {tensor: math.prod(shape) for tensor, shape in tensor_shapes(folder / name).items()}
    if is_tied:
        sizes.pop(HEAD, None)
    return sum(sizes.values())


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file (a length in 8 bytes, then that many bytes of JSON)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        found = json.loads(header)
        return {name: entry["shape"] for name, entry in found.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no valid safetensors header") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    return content
