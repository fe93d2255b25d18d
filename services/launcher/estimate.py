"""Estimates, from a model's config.json and the settings alone: memory of learner and engine, and bytes moved.

Parameters are counted exactly for the dense decoders Qwen2, Qwen3 and Llama; bytes follow from what the code
allocates, and the formulas stand at the functions. Left out: fragmentation, CUDA graphs, the libraries themselves,
and attention that stores a tokens x tokens matrix (SDPA's own kernels do not).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import RunConfig
from common.device import resolve_device
from common.wire import Group, Rollout, Sampling, Ticket, Timings, VersionSpan, encode

TYPICAL_PROMPT_TOKENS = 256
CHARS_PER_TOKEN = 4
BYTES = {"float32": 4, "bfloat16": 2}
DENSE = ("llama", "qwen2", "qwen3")
Rows = dict[str, int]
"""What -> bytes."""


@dataclass(frozen=True)
class Shape:
    """What of a config.json decides sizes."""

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

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Each tensor once: a tied head is the embedding."""
        attention = 2 * self.hidden * (self.query + self.key_value)
        attention += self.has_qkv_bias * (self.query + 2 * self.key_value) + self.has_output_bias * self.hidden
        attention += self.has_qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden * self.intermediate + self.has_mlp_bias * (2 * self.intermediate + self.hidden)
        layer = attention + mlp + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocab * self.hidden * (1 if self.is_tied else 2)


def read_shape(model_config: dict[str, Any]) -> Shape:
    """Raises `ValueError` for a model that is none of `DENSE` or lacks a size."""
    kind = model_config.get("model_type")
    if kind not in DENSE:
        raise ValueError(f"model_type is {kind!r}, and only {', '.join(DENSE)} are counted")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for size in sizes:
        if not isinstance(model_config.get(size), int) or model_config[size] < 1:
            raise ValueError(f"config.json: {size} is {model_config.get(size)!r}, expected a positive number")
    hidden, layers, heads, intermediate, vocab = (model_config[size] for size in sizes)
    attention_bias = bool(model_config.get("attention_bias", False))
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=model_config.get("num_key_value_heads") or heads,
        head_dim=model_config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
        intermediate=intermediate,
        vocab=vocab,
        is_tied=bool(model_config.get("tie_word_embeddings", False)),
        has_qkv_bias=kind == "qwen2" or attention_bias,
        has_output_bias=kind != "qwen2" and attention_bias,
        has_mlp_bias=kind == "llama" and bool(model_config.get("mlp_bias", False)),
        has_qk_norm=kind == "qwen3",
    )


def learner_bytes(shape: Shape, config: RunConfig) -> Rows:
    """The learner's device at its peak: a backward pass with all gradients there."""
    size, dtype = BYTES[config.model.dtype], config.model.dtype
    count, learner = shape.num_parameters, config.learner
    rows = {f"weights, {dtype}": count * size}
    if dtype != "float32":
        rows["masters, float32"] = count * 4
    rows["AdamW's moments, float32"] = count * 8
    rows["gradients, float32"] = count * 4
    if config.actor.kl_coef > 0:
        rows[f"reference policy, {dtype}"] = count * size
    how = "recomputed" if learner.gradient_checkpointing else "kept"
    rows[f"activations of {learner.micro_batch_tokens:,} tokens, {how}"] = activation_bytes(
        shape, learner.micro_batch_tokens, size, is_checkpointed=learner.gradient_checkpointing
    )
    device = resolve_device(learner.device)
    chunk = min(learner.chunk_tokens(device), learner.micro_batch_tokens)
    rows[f"log-probabilities, {chunk:,} tokens at a time"] = logprob_bytes(shape, chunk, size, is_cuda=device == "cuda")
    return rows


def activation_bytes(shape: Shape, tokens: int, size: int, *, is_checkpointed: bool) -> int:
    """What autograd keeps of one forward pass; `size` is of an element of the model's dtype.

    A layer keeps, per token: for each of two norms its input in float32, the normalised row and the result; queries,
    keys, values and the attention's result; gate, its activation, up and their product. So, with Q and KV the
    widths of queries and of keys: `size * (4 H + 2 Q + 2 KV + 4 I) + 8 H`, and `(size + 4) * (Q + KV)` more with
    norms on queries and keys. With gradient checkpointing: the layers' inputs, `layers * tokens * H * size`, and
    one layer's working set.
    """
    layer = size * (4 * shape.hidden + 2 * shape.query + 2 * shape.key_value + 4 * shape.intermediate)
    layer += 8 * shape.hidden + shape.has_qk_norm * (size + 4) * (shape.query + shape.key_value)
    per_token = shape.layers * shape.hidden * size + layer if is_checkpointed else shape.layers * layer
    return tokens * per_token


def logprob_bytes(shape: Shape, chunk_tokens: int, size: int, *, is_cuda: bool) -> int:
    """`services.learner.logprobs` backward: a chunk's logits, float32, which become their gradient; and the head's
    gradient, summed in float32. Of a bfloat16 model, on CUDA: the logits' gradient rounded, and a chunk's part of the
    head's, float32; on a CPU: the head's gradient as it is handed on."""
    head, chunk = shape.vocab * shape.hidden, chunk_tokens * shape.vocab
    if size == 4:
        return chunk * 4 + head * 4
    return chunk * 6 + head * 8 if is_cuda else chunk * 4 + head * 6


def engine_bytes(shape: Shape, config: RunConfig, max_total_tokens: int | None) -> Rows:
    """One replica's engine. Without `max_total_tokens`, the cache that all its requests at full length would fill."""
    size, engine = BYTES[config.model.dtype], config.generation.engine
    per_request = config.sampling.max_new_tokens + TYPICAL_PROMPT_TOKENS
    tokens = max_total_tokens or engine.max_running_requests * per_request
    why = "" if max_total_tokens else f" ({engine.max_running_requests} requests x {per_request:,})"
    per_token = kv_bytes_per_token(shape, size)
    return {
        f"weights, {config.model.dtype}": shape.num_parameters * size,
        f"KV cache of {tokens:,} tokens{why}, {per_token:,} bytes each": tokens * per_token,
    }


def kv_bytes_per_token(shape: Shape, size: int) -> int:
    return 2 * shape.layers * shape.key_value * size


def moved_bytes(shape: Shape, config: RunConfig) -> Rows:
    """A version is all weights, whatever changed. A step's groups are encoded, with every completion at full length."""
    version = shape.num_parameters * BYTES[config.model.dtype]
    group = full_length_group(config, shape.vocab)
    groups, replicas = config.learner.groups_per_step, config.generation.replicas
    num_tokens = config.actor.group_size * config.sampling.max_new_tokens
    per_group = len(encode(group))
    per_step = groups * (per_group + len(encode(group.ticket)))
    return {
        f"per version, to {replicas} replica{'s' * (replicas > 1)}": version * replicas,
        f"per step through Redis, at most ({groups} groups, {per_group / num_tokens:.1f} bytes a token)": per_step,
    }


def full_length_group(config: RunConfig, vocab: int) -> Group:
    """A group whose completions all reach max_new_tokens, with ids from all over the vocabulary."""
    length, count = config.sampling.max_new_tokens, config.actor.group_size
    ticket = Ticket(
        id="0-0",
        kind="train",
        prompt_tokens=np.linspace(0, vocab - 1, TYPICAL_PROMPT_TOKENS, dtype=int).tolist(),
        messages=[{"role": "user", "content": "x" * (TYPICAL_PROMPT_TOKENS * CHARS_PER_TOKEN)}],
        reference={"answer": "0"},
        num_completions=count,
        sampling=Sampling(config.sampling.temperature, length, [0]),
        min_weight_version=1,
    )
    rollout = Rollout(
        tokens=np.linspace(0, vocab - 1, length, dtype=np.int32),
        loss_mask=b"\1" * length,
        behaviour_logprobs=np.full(length, -1.0, np.float32),
        version_spans=[VersionSpan(1, 0, length)],
        reward=1.0,
        finish_reason="length",
        text="x" * (length * CHARS_PER_TOKEN),
    )
    return Group(ticket=ticket, rollouts=[rollout] * count, replica="generation-0", timings=Timings(0.0, 0.0, 0.0))
