"""The arguments of sglang.launch_server that `generation.engine.extra_args` may not have, and what to use instead.

Refused are arguments that Headrace sets (by a setting, or without a choice) and arguments with which results would be
wrong.
"""

import itertools
from collections.abc import Iterator, Sequence

SETTINGS = {
    "--chat-template": "model.chat_template",
    "--context-length": "generation.engine.context_tokens",
    "--cuda-graph-max-bs-decode": "generation.engine.max_running_requests",
    "--device": "generation.engine.device",
    "--disable-radix-cache": "generation.engine.prefix_cache",
    "--dtype": "model.dtype",
    "--enable-fp32-lm-head": "model.dtype, with which it goes",
    "--max-running-requests": "generation.engine.max_running_requests",
    "--max-total-tokens": "generation.engine.max_total_tokens",
    "--mem-fraction-static": "generation.engine.memory_fraction",
    "--model": "model.path",
    "--model-path": "model.path",
    "--reasoning-parser": "environment.reasoning_parser",
    "--revision": "model.revision",
    "--tensor-parallel-size": "generation.engine.tp_size",
    "--tool-call-parser": "environment.tool_call_parser",
    "--tp-size": "generation.engine.tp_size",
    "--trust-remote-code": "model.trust_remote_code",
}
SET_BY_REPLICA = ("--admin-api-key", "--api-key", "--base-gpu-id", "--host", "--port", "--weight-version")
"""Arguments whose values the replica chooses for its engine."""
REPLICAS = "more replicas (headrace scale)"
ONE_AT_MOST = {
    "--data-parallel-size": REPLICAS,
    "--dp-size": REPLICAS,
    "--nnodes": REPLICAS,
    "--pipeline-parallel-size": "generation.engine.tp_size",
    "--pp-size": "generation.engine.tp_size",
    "--tokenizer-worker-num": "1, since a pause for new weights does not reach all of them",
}
QUANTIZED = ("--modelopt-quant", "--quantization", "--quantize-and-serve", "--rl-quant-profile")
CACHED = ("--enable-flexkv", "--enable-hicache", "--enable-hierarchical-cache", "--enable-lmcache")
"""Arguments with which the KV cache outlives its request."""


def check_extra_args(extra_args: Sequence[str], swap_mode: str, tp_size: int) -> None:
    """Raises `ValueError` naming the first argument that is refused, and what to use instead."""
    for word, value in _flags(extra_args):
        if problem := _problem(word, value):
            raise ValueError(f"{' '.join(filter(None, (word, value)))} in extra_args: {problem}")
        if swap_mode == "in_place" and _is_one_of(word, CACHED):
            raise ValueError(
                f"{word} in extra_args: the cache would give KV of earlier weights to later requests; expected "
                f"swap_mode "
                "retract"
            )
    if swap_mode == "in_place" and tp_size > 1:
        raise ValueError(
            f"tp_size {tp_size}: swap_mode in_place can deadlock under tensor parallelism; expected swap_mode retract"
        )


def _problem(word: str, value: str) -> str:
    if _is_one_of(word, QUANTIZED):
        return (
            "new weights are published in model.dtype and would not be quantized like these; expected no quantization"
        )
    if _is_one_of(word, SET_BY_REPLICA):
        return "the replica sets it for each engine; expected no such argument"
    for flag, setting in SETTINGS.items():
        if _is_one_of(word, [flag]):
            return f"expected the setting {setting}"
    for flag, instead in ONE_AT_MOST.items():
        if _is_one_of(word, [flag]) and value != "1":
            return f"expected {instead}"
    return ""


def _is_one_of(word: str, flags: Sequence[str]) -> bool:
    """Whether `word` is one of the flags, or an abbreviation of one, which argparse accepts."""
    return len(word) > len("--") and any(flag.startswith(word) for flag in flags)


def _flags(extra_args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each flag with the value that follows it, or ""; `--flag=value` and `--flag value` are the same."""
    words = [part for argument in extra_args for part in argument.split("=", 1)]
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            yield word.replace("_", "-"), "" if following.startswith("--") else following
