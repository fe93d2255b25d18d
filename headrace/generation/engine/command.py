"""The command line and the environment of an SGLang server.

On CUDA the server is started directly, on a CPU through `headrace.generation.engine.cpu.launch_server`.
"""

import os
import sys
from pathlib import Path

import headrace
from headrace.common.config import EngineConfig, EnvironmentConfig
from headrace.common.hardware.device import CPU_MAX_TOTAL_TOKENS, VISIBLE_DEVICES, resolve_device
from headrace.common.preflight.installation import CPU_PACKAGES
from headrace.common.process.child_process import untrusted_code_environment

HOST = "127.0.0.1"
CPU_MEMORY_FRACTION = 0.3
VARIABLES = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "0", "SGLANG_FORWARD_UNKNOWN_TOOLS": "1"}
"""Log-probabilities are those of the sampling distribution, after the temperature. A call of a tool that was not
offered is a tool call: its environment answers it."""
IMPORT_ROOT = Path(headrace.__file__).parents[1]
"""The folder from which this process imports headrace: a checkout, or an environment's site-packages."""


def launch_command(
    settings: EngineConfig,
    dtype: str,
    model_path: str | Path,
    weight_version: int | None,
    port: int,
    environment: EnvironmentConfig | None = None,
    chat_template: str | None = None,
) -> list[str]:
    """`environment`: the settings of a task with `rollout`; None for one with `reward`. `chat_template`: a file that
    replaces the model's template."""
    on_cpu = resolve_device(settings.device) == "cpu"
    max_total_tokens, memory_fraction = settings.max_total_tokens, settings.memory_fraction
    module = "sglang.launch_server"
    args = ["--model-path", str(model_path), "--host", HOST, "--port", str(port), "--log-level", "warning"]
    if on_cpu:
        module = "headrace.generation.engine.cpu.launch_server"
        args += ["--device", "cpu", "--skip-server-warmup", "--sleep-on-idle"]  # else it spins on a core when idle
        # Four decode steps between two checks for prefills make the prefills fewer and larger. Together with no prefix
        # cache for prompts that come once: about 1.4 times the tokens per second.
        args += ["--num-continuous-decode-steps", "4"]
        max_total_tokens = max_total_tokens or CPU_MAX_TOTAL_TOKENS
        memory_fraction = memory_fraction or CPU_MEMORY_FRACTION
    else:
        # SGLang's default limit for CUDA graphs is 32 to 512 requests, depending on the GPU's memory; larger batches
        # would decode without graphs.
        args += ["--cuda-graph-max-bs-decode", str(settings.max_running_requests)]
        args += ["--tp-size", str(settings.tp_size)]
    if settings.swap_mode == "in_place":
        args += ["--disable-overlap-schedule"]  # else one token per request would get the wrong version
    if not _has_prefix_cache(settings, is_multi_turn=environment is not None):
        args += ["--disable-radix-cache"]
    if environment is not None:
        args += ["--tool-call-parser", environment.tool_call_parser]
        args += ["--reasoning-parser", environment.reasoning_parser]
        args += ["--chat-template", chat_template] if chat_template is not None else []  # in which parsers are detected
    args += ["--dtype", dtype, "--max-running-requests", str(settings.max_running_requests)]
    if dtype == "bfloat16":
        args += ["--enable-fp32-lm-head"]  # as in the learner: logits rounded to bfloat16 are 0.125 apart at 16
    if settings.context_tokens is not None:
        args += ["--context-length", str(settings.context_tokens)]
    if max_total_tokens is not None:
        args += ["--max-total-tokens", str(max_total_tokens)]
    if memory_fraction is not None:
        args += ["--mem-fraction-static", str(memory_fraction)]
    if weight_version is not None:
        args += ["--weight-version", str(weight_version)]
    return [sys.executable, "-m", module, *args, *settings.extra_args]


def _has_prefix_cache(settings: EngineConfig, is_multi_turn: bool) -> bool:
    """With swaps in place it would give later requests KV of earlier weights: it cannot be flushed while requests are
    in flight. On a CPU it costs more than it saves for prompts that come once."""
    if settings.prefix_cache != "auto":
        return settings.prefix_cache
    return settings.swap_mode == "retract" and (is_multi_turn or resolve_device(settings.device) == "cuda")


def launch_environment(settings: EngineConfig) -> dict[str, str]:
    """The environment of this process without the run's secrets, and SGLang's variables.

    On a CPU, SGLang uses the CPU even if there is a GPU, with few threads that do not spin beside the learner's.
    """
    environment = untrusted_code_environment() | VARIABLES
    if resolve_device(settings.device) == "cpu":
        search_path = [str(IMPORT_ROOT), str(CPU_PACKAGES), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {
            VISIBLE_DEVICES: "",
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": str(settings.num_threads),
            "MKL_NUM_THREADS": str(settings.num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(search_path),
        }
    return environment
