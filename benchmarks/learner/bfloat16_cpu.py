"""The gain of a learner on a CPU from computing bfloat16 weights in float32.

    python -m benchmarks.learner.bfloat16_cpu

One forward and one backward pass of a random model of SmolLM2-135M's shape over a prompt of 128 tokens with eight
completions of 96, by one thread, in turns: in bfloat16, and in float32 with the same weights. Prints the processor
seconds of each and the difference of their log-probabilities. The result is meaningful only on a CPU without bfloat16
units; the command prints whether this CPU has them.
"""

import argparse
import tempfile
import time
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.learner.throughput import samples_of
from headrace.common.config import LearnerConfig, ModelConfig
from headrace.common.hardware.device import has_bfloat16_units
from headrace.learner.model.packing import MicroBatch, pack
from headrace.learner.model.policy import Policy

MODEL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
MODEL |= {"num_key_value_heads": 3, "vocab_size": 49_152}
PROMPT, COMPLETIONS = 128, [96] * 8
DTYPES = ("bfloat16", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner.bfloat16_cpu")
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    learner = LearnerConfig(device="cpu", micro_batch_tokens=1 << 20)
    (micro_batch,) = pack(samples_of(PROMPT, COMPLETIONS), learner.micro_batch_tokens)
    with tempfile.TemporaryDirectory(prefix="headrace-bfloat16-") as folder:
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODEL), dtype=torch.bfloat16)
        made.save_pretrained(folder)
        policies = {dtype: policy_computing_in(dtype, folder, learner) for dtype in DTYPES}
        turns = [{dtype: timed(policy, micro_batch) for dtype, policy in policies.items()} for _ in range(repeats)]
    print(f"this CPU has {'' if has_bfloat16_units() else 'no '}units for bfloat16")
    for dtype in DTYPES:
        forward, backward = (np.array([turn[dtype][part] for turn in turns]) for part in (0, 1))
        print(
            f"{dtype}: forward {np.median(forward):.1f} s ({forward.min():.1f} to {forward.max():.1f}), "
            f"backward {np.median(backward):.1f} s ({backward.min():.1f} to {backward.max():.1f}) of one core"
        )
    apart = np.abs(turns[-1]["bfloat16"][2] - turns[-1]["float32"][2])
    print(f"log-probabilities apart: mean {apart.mean():.4f}, max {apart.max():.4f}")


def policy_computing_in(dtype: str, folder: str, learner: LearnerConfig) -> Policy:
    """A policy with the same bfloat16 weights that computes in `dtype`, whatever this CPU supports."""
    with patch("headrace.learner.model.policy.compute_dtype", lambda *_: dtype):
        return Policy(ModelConfig(path=folder, dtype="bfloat16"), learner)


def timed(policy: Policy, micro_batch: MicroBatch) -> tuple[float, float, np.ndarray]:
    """Processor seconds of the forward and the backward pass, and the log-probabilities `(N,)`."""
    policy.model.zero_grad()
    started = time.process_time()
    found = policy.logprobs(micro_batch)
    between = time.process_time()
    (found * torch.linspace(-1, 1, len(found))).sum().backward()
    return between - started, time.process_time() - between, found.detach().numpy()


if __name__ == "__main__":
    main()
