"""What `generation.engine.extra_args` may not have: the setting that is meant is named, or why there is none."""

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from headrace.common.config import EngineConfig, EnvironmentConfig
from headrace.common.config.engine_args import CACHED, ONE_AT_MOST, QUANTIZED, SET_BY_REPLICA, SETTINGS
from headrace.generation.engine.command import launch_command


@pytest.mark.parametrize(
    ("extra_args", "line"),
    [
        (["--quantization", "fp8"], "--quantization fp8 in extra_args: new weights are published in model.dtype"),
        (["--quant=fp8"], "--quant fp8 in extra_args: new weights are published"),
        (["--tokenizer-worker-num", "2"], "a pause for new weights does not reach all of them"),
        (["--tp", "2"], "--tp 2 in extra_args: expected the setting generation.engine.tp_size"),
        (["--tp-size", "1"], "expected the setting generation.engine.tp_size"),
        (["--tensor-parallel-size=4"], "--tensor-parallel-size 4 in extra_args: expected the setting"),
        (["--mem-fraction-static", "0.5"], "expected the setting generation.engine.memory_fraction"),
        (["--mem-fr=0.5"], "expected the setting generation.engine.memory_fraction"),
        (["--context-length", "4096"], "expected the setting generation.engine.context_tokens"),
        (["--log-level", "info", "--port", "30000"], "--port 30000 in extra_args: the replica sets it for each engine"),
        (["--host=0.0.0.0"], "the replica sets it for each engine"),
        (["--model_path", "other"], "expected the setting model.path"),
        (["--enable-fp32-lm-head"], "--enable-fp32-lm-head in extra_args: expected the setting model.dtype"),
        (["--dp-size", "2"], r"expected more replicas \(headrace scale\)"),
        (["--pp-size"], "expected generation.engine.tp_size"),
    ],
)
def test_what_is_set_or_cannot_be_served_is_refused_with_what_to_use(extra_args: list[str], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        EngineConfig(extra_args=extra_args)


@pytest.mark.parametrize(
    "extra_args",
    [
        ["--log-level", "info"],
        ["--attention-backend=triton"],
        ["--tokenizer-worker-num", "1", "--dp-size=1"],
        ["--enable-hierarchical-cache"],
        ["--context-bucket", "1", "--cuda-graph-max-bs-prefill", "8"],
    ],
)
def test_other_arguments_are_taken_as_they_are(extra_args: list[str]) -> None:
    assert EngineConfig(extra_args=extra_args).extra_args == extra_args


def test_in_place_goes_with_neither_tensor_parallelism_nor_a_cache() -> None:
    assert EngineConfig(tp_size=2).tp_size == 2
    with pytest.raises(ValidationError, match="prefix_cache true: swap_mode in_place would give KV of earlier"):
        EngineConfig(swap_mode="in_place", prefix_cache=True)
    EngineConfig(swap_mode="in_place", prefix_cache=False)
    with pytest.raises(ValidationError, match="tp_size 2: swap_mode in_place can deadlock"):
        EngineConfig(swap_mode="in_place", tp_size=2)
    with pytest.raises(ValidationError, match="--enable-hierarchical-cache in extra_args: the cache would give KV"):
        EngineConfig(swap_mode="in_place", extra_args=["--enable-hierarchical-cache"])


def sglang_options() -> set[str]:
    """Its fields are read, not imported, which takes seconds."""
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None and sglang.origin is not None
    server = Path(sglang.origin).parent / "srt"
    text = "\n".join(path.read_text() for path in (server / "arg_groups" / "fields").glob("*.py"))
    names = {"--" + name.replace("_", "-") for name in re.findall(r"^    (\w+): A\[", text, re.M)}
    assert len(names) > 500
    return names | set(re.findall(r'"(--[\w-]+)"', text + (server / "server_args.py").read_text()))


def test_the_flags_that_are_refused_and_those_that_are_given_are_sglangs() -> None:
    """A flag that SGLang renames would no longer be refused, or end the engine at its start."""
    options = sglang_options()
    assert {*SETTINGS, *SET_BY_REPLICA, *ONE_AT_MOST, *QUANTIZED, *CACHED} <= options
    chosen: list[dict[str, Any]] = [
        {"device": "cuda", "tp_size": 2, "context_tokens": 64, "max_total_tokens": 4096, "memory_fraction": 0.5},
        {"device": "cuda", "swap_mode": "in_place", "extra_args": ["--chunked-prefill-size", "2048"]},
        {"device": "cpu"},
    ]
    for settings, environment in itertools.product(chosen, (None, EnvironmentConfig())):
        command = launch_command(EngineConfig(**settings), "bfloat16", "model", 1, 1, environment, "template.jinja")
        given = [word for word in command if word.startswith("--")]
        assert set(given) <= options and len(given) == len(set(given)), given
