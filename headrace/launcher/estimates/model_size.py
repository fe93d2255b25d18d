"""How large a model is: its parameters, from its files' headers where they are here, else from its config.json.

A header of safetensors names every tensor's shape, whatever the architecture. Without the files parameters are counted
exactly for the dense decoders Qwen2, Qwen3 and Llama. Nothing of the weights is read.
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
"""That safetensors itself allows."""


@dataclass(frozen=True)
class Shape:
    """What of a config.json decides sizes. Of a mixture of experts `intermediate` is what a token passes through."""

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
    """Parameters in the model's files, each tensor once."""

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Each tensor once: a tied head is the embedding."""
        return self.counted or self.layers * self._layer + self.num_root_parameters

    @property
    def num_root_parameters(self) -> int:
        """Of what is in no layer: embedding, head, the last norm."""
        return self.hidden + self.vocab * self.hidden * (1 if self.is_tied else 2)

    @property
    def num_layer_parameters(self) -> int:
        """Of one layer, all experts included."""
        return (self.num_parameters - self.num_root_parameters) // self.layers

    @property
    def num_active_parameters(self) -> int:
        """That one token is multiplied with: without the embedding, and of experts only those that it goes through."""
        return self.layers * self._layer + self.hidden * (1 + self.vocab)

    @property
    def _layer(self) -> int:
        attention = 2 * self.hidden * (self.query + self.key_value)
        attention += self.has_qkv_bias * (self.query + 2 * self.key_value) + self.has_output_bias * self.hidden
        attention += self.has_qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden * self.intermediate + self.has_mlp_bias * (2 * self.intermediate + self.hidden)
        return attention + mlp + 2 * self.hidden


def shape_of(config: RunConfig) -> Shape:
    """Of the run's model. Raises `ValueError` if it is not here, or not known."""
    model = config.model
    folder = model_files(model.location, model.revision)
    return shape_in(folder, read_model_file(model.location, folder / "config.json"))


def shape_in(folder: Path, model_config: dict[str, Any]) -> Shape:
    """Of the model in the folder, whose weights may not be there. Raises `ValueError` if its size is not known."""
    is_tied = bool(
        _text_config(model_config).get("tie_word_embeddings", model_config.get("tie_word_embeddings", False))
    )
    return read_shape(model_config, count_parameters(folder, is_tied))


def read_shape(model_config: dict[str, Any], counted: int | None = None) -> Shape:
    """Raises `ValueError` for a model that lacks a size, or, without `counted`, is none of `DENSE`."""
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
    """Of a model of several kinds of input the part that reads text."""
    inner: dict[str, Any] = model_config.get("text_config") or model_config
    return inner


def _intermediate(text: dict[str, Any]) -> int:
    """The width of the MLP that one token goes through."""
    width = text.get("intermediate_size")
    if expert := text.get("moe_intermediate_size"):
        width = expert * (text.get("num_experts_per_tok") or 1) + (text.get("shared_expert_intermediate_size") or 0)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"config.json: intermediate_size is {width!r}, expected a positive number")
    return width


def count_parameters(folder: Path, is_tied: bool) -> int | None:
    """By the headers of the folder's safetensors; None where these are not (all) here. A head that is tied to the
    embedding counts once, whether or not it is in the files. Raises `ValueError` naming a file that is none."""
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
    """Of the tensors in a file of safetensors (a length in 8 bytes, then so many bytes of JSON)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        found = json.loads(header)
        return {name: entry["shape"] for name, entry in found.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no header of safetensors in it") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    return content
