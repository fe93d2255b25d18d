"""Estimated memory of the devices, from a model's size and the settings: the learner's, by rank, and an engine's.

The bytes follow from what the code allocates; each function has its formula. Not included are fragmentation, the
libraries (see host_memory.py), and attention that stores a tokens x tokens matrix (SDPA's own kernels do not).
"""

from headrace.common.config import RunConfig
from headrace.common.hardware.device import compute_dtype, resolve_device
from headrace.launcher.estimates.model_size import Shape

TYPICAL_PROMPT_TOKENS = 256
BYTES = {"float32": 4, "bfloat16": 2}
Rows = dict[str, int]
"""Description -> bytes."""
MIB = 1 << 20
LARGE_MIB = 60 * 1024
PREFILL_TOKENS = ((20 * 1024, 2048), (60 * 1024, 4096), (160 * 1024, 8192), (float("inf"), 16384))
"""(GPU memory in MiB, tokens): the tokens of one of SGLang's prefills on a GPU with less memory."""


def learner_bytes(shape: Shape, config: RunConfig) -> Rows:
    """Memory of each rank's device at its peak, a backward pass with all gradients allocated."""
    size, learner = BYTES[learner_dtype(config)], config.learner
    rows = _whole(shape, config) if learner.num_ranks == 1 else _sharded(shape, config)
    how = "recomputed" if learner.gradient_checkpointing else "kept"
    rows[f"activations of {learner.micro_batch_tokens:,} tokens, {how}"] = activation_bytes(
        shape, learner.micro_batch_tokens, size, is_checkpointed=learner.gradient_checkpointing
    )
    device = resolve_device(learner.device)
    chunk = min(learner.chunk_tokens(device), learner.micro_batch_tokens)
    rows[f"log-probabilities, {chunk:,} tokens at a time"] = logprob_bytes(shape, chunk, size, is_cuda=device == "cuda")
    return rows


def learner_dtype(config: RunConfig) -> str:
    """The dtype of the learner's multiplications (headrace/learner/model/loading.py)."""
    return compute_dtype(config.model.dtype, resolve_device(config.learner.device))


def _whole(shape: Shape, config: RunConfig) -> Rows:
    """Memory of a single rank. Masters are float32; float32 weights are their own masters."""
    dtype, computed, count = config.model.dtype, learner_dtype(config), shape.num_parameters
    shown = dtype if computed == dtype else f"{dtype} in {computed}"
    rows = {f"weights, {shown}": count * BYTES[computed]}
    if dtype != "float32":
        rows["masters, float32"] = count * 4
    rows["AdamW's moments, float32"] = count * 8
    rows["gradients, float32"] = count * 4
    if config.actor.kl_coef > 0:
        rows[f"reference policy, {shown}"] = count * BYTES[computed]
    return rows


def _sharded(shape: Shape, config: RunConfig) -> Rows:
    """Memory of each of several ranks (headrace/learner/distributed/fsdp.py).

    A rank has its part of masters, moments and gradients; the gathered embedding and head during the whole pass, and
    the gathered layers that are computed now and next; and the gradient of the largest of these, in the model's dtype
    and in float32, in which it is summed over ranks.
    """
    dtype, part = learner_dtype(config), -(-shape.num_parameters // config.learner.num_ranks)
    size, layer, root = BYTES[dtype], shape.num_layer_parameters, shape.num_root_parameters
    rows = {
        "masters, float32, its part": part * 4,
        "AdamW's moments, float32, its part": part * 8,
        "gradients, float32, its part": part * 4,
        f"gathered, {dtype}: embedding and head, two layers": (root + 2 * layer) * size,
        "gradient of the largest of these, on its way": max(root, layer) * (size + 4),
    }
    if dtype != config.model.dtype:
        rows[f"weights, {config.model.dtype} in {dtype}, its part"] = part * 4
    if config.actor.kl_coef > 0:
        rows["reference policy, float32, its part"] = part * 4
    return rows


def activation_bytes(shape: Shape, tokens: int, size: int, *, is_checkpointed: bool) -> int:
    """Bytes that autograd keeps of one forward pass; `size` is the element size of the model's dtype.

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
    """Bytes of the backward pass of `headrace.learner.model.logprobs`.

    It has a chunk's float32 logits, which become their gradient, and the head's gradient, summed in float32. A bfloat16
    model also has, on CUDA, the rounded gradient of the logits and a chunk's part of the head's gradient in float32;
    on a CPU, the head's gradient in bfloat16.
    """
    head, chunk = shape.vocab * shape.hidden, chunk_tokens * shape.vocab
    if size == 4:
        return chunk * 4 + head * 4
    return chunk * 6 + head * 8 if is_cuda else chunk * 4 + head * 6


def engine_bytes(shape: Shape, config: RunConfig, max_total_tokens: int | None, gpu_bytes: int = 0) -> Rows:
    """Memory of one replica's engine on each of its devices.

    On a GPU of `gpu_bytes` the engine takes SGLang's share. Without a GPU and `max_total_tokens`, the KV cache is as
    large as all requests at full length need.
    """
    size, engine = BYTES[config.model.dtype], config.generation.engine
    parts = engine.tp_size
    weights = {f"weights, {config.model.dtype}{' of its part' * (parts > 1)}": shape.num_parameters * size // parts}
    per_token = max(1, kv_bytes_per_token(shape, size) // parts)
    if gpu_bytes and not max_total_tokens:
        static = int(gpu_bytes * (engine.memory_fraction or static_fraction(gpu_bytes, config)))
        cache = max(0, static - sum(weights.values()))
        share = f"{static / gpu_bytes:.0%} of the device with the weights"
        return weights | {
            f"KV cache, {cache // per_token:,} tokens of {per_token:,} bytes: SGLang takes {share}": cache,
            "activations and CUDA graphs, what SGLang leaves for them": gpu_bytes - static,
        }
    per_request = config.sampling.max_new_tokens + TYPICAL_PROMPT_TOKENS
    tokens = max_total_tokens or engine.max_running_requests * per_request
    why = "" if max_total_tokens else f" ({engine.max_running_requests} requests x {per_request:,})"
    return weights | {f"KV cache of {tokens:,} tokens{why}, {per_token:,} bytes each": tokens * per_token}


def static_fraction(gpu_bytes: int, config: RunConfig) -> float:
    """SGLang's default share of a GPU for weights and KV cache (sglang 0.5.23, srt/arg_groups/memory_hook.py).

    It reserves 512 MiB, 1.5 MiB per token of a prefill, 2 MiB per request of the largest CUDA graph, 8 MiB per prefill
    graph, and 128 MiB per GPU of tensor parallelism; at least 10 GiB on a large GPU.
    """
    mib = gpu_bytes / MIB
    prefill_tokens = next(tokens for below, tokens in PREFILL_TOKENS if mib < below)
    reserved = 512 + 1.5 * prefill_tokens + 2 * config.generation.engine.max_running_requests
    reserved += 8 * num_prefill_graphs(prefill_tokens) + 128 * config.generation.engine.tp_size
    if mib > LARGE_MIB:
        reserved = max(reserved, 10 * 1024)
    return round((mib - reserved) / mib, 3)


def num_prefill_graphs(prefill_tokens: int) -> int:
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256))
    sizes = [size for step in (*steps, (4608, prefill_tokens + 1, 512)) for size in range(*step)]
    return sum(size <= prefill_tokens for size in sizes)


def kv_bytes_per_token(shape: Shape, size: int) -> int:
    return 2 * shape.layers * shape.key_value * size
