"""The learner's forward and backward pass against plain transformers.

    python -m benchmarks.learner.throughput [--repeats 3]

Two comparisons, in turns on the same machine (on a GPU if torch sees one), both with a check that the gradients agree.
(1) Tokens per second of a group of 8 completions, by the learner (the prompt is computed once, only attention is
padded) and by the same model on the same batch padded on the right, for completions of equal length and for
heavy-tailed ones; on both sides a prompt's token counts once per completion. (2) Log-probabilities of 6,144 tokens with
a vocabulary of 151,936, in chunks (without the entropy that otherwise comes with them) and with all logits at once:
seconds, and the peak of memory beyond what was in use before, each in a separate process. Rows go to
benchmarks/results/learner.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.demo import ROOT, said_in, this_machine
from headrace.common.config import LearnerConfig, ModelConfig
from headrace.common.wire import Group, Rollout, Sampling, Ticket, Timings, VersionSpan
from headrace.learner.model import logprobs as learner_logprobs
from headrace.learner.model.packing import Sample, pack
from headrace.learner.model.policy import Policy, pick_device

RESULTS = ROOT / "benchmarks" / "results" / "learner.json"
SHAPES = {"512 + 8 x 256": (512, [256] * 8), "128 + 8 x 20 to 512": (128, [20, 31, 47, 73, 112, 170, 300, 512])}
MODEL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
MODEL |= {"num_key_value_heads": 2, "vocab_size": 4096, "head_dim": 64}
VOCABULARY, HIDDEN, NUM_TOKENS = 151_936, 256, 6144
KINDS = ("chunked", "without entropy", "whole")
DEVICE = pick_device("auto")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner.throughput")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--logprobs", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.logprobs:
        print(json.dumps(logprobs_once(arguments.logprobs)))
        return
    with tempfile.TemporaryDirectory(prefix="headrace-learner-") as folder:
        rows = [row for name in SHAPES for row in passes(Path(folder), name, arguments.repeats)]
    rows += [logprobs(kind) for _ in range(arguments.repeats) for kind in KINDS]
    machine = this_machine()
    RESULTS.write_text(
        json.dumps({"machine": machine | {"load_average": os.getloadavg()}, "rows": rows}, indent=1) + "\n"
    )
    report(rows, Console(highlight=False, width=120))


def passes(folder: Path, shape: str, repeats: int) -> list[Row]:
    """Turns of both sides, after one of each to warm up."""
    path = folder / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **MODEL)).save_pretrained(path)
    learner = LearnerConfig(gradient_checkpointing=False, micro_batch_tokens=1 << 20)
    policy = Policy(ModelConfig(path=str(path), dtype="float32"), learner)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(DEVICE)
    (micro_batch,) = pack(samples_of(*SHAPES[shape]), learner.micro_batch_tokens)
    ids, lengths = padded(*SHAPES[shape])
    ids = ids.to(DEVICE)

    def ours() -> Tensor:
        return policy.logprobs(micro_batch)

    def theirs() -> Tensor:
        logprobs = plain(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        prompt = SHAPES[shape][0]
        return torch.cat([row[prompt - 1 : prompt - 1 + length] for row, length in zip(logprobs, lengths, strict=True)])

    rows = []
    for turn in range(repeats + 1):
        timed = {"ours": step(policy.model, ours), "padded": step(plain, theirs)}
        distance = (timed["ours"][1] - timed["padded"][1]).norm() / timed["padded"][1].norm()
        num_tokens = sum(SHAPES[shape][0] + length for length in lengths)
        for who, (seconds, _) in timed.items():
            row = {"kind": "pass", "shape": shape, "who": who, "tokens_per_s": num_tokens / seconds}
            rows += [row | {"gradients_apart": distance.item()}] if turn else []
    return rows


def step(model: Any, logprobs: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of a forward and a backward pass, and the gradient."""
    model.zero_grad()
    started = now()
    found = logprobs()
    (found * torch.linspace(-1, 1, len(found), device=DEVICE)).sum().backward()
    seconds = now() - started
    return seconds, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def now() -> float:
    """The time when the device has finished all work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def tokens_of(prompt: int, lengths: list[int]) -> tuple[list[int], list[list[int]]]:
    rng = random.Random(0)
    made = [[rng.randrange(MODEL["vocab_size"]) for _ in range(length)] for length in (prompt, *lengths)]
    return made[0], made[1:]


def samples_of(prompt: int, lengths: list[int]) -> list[Sample]:
    """Samples in the order of `padded`: the longest first."""
    tokens, completions = tokens_of(prompt, lengths)
    ticket = Ticket("0-0", "train", tokens, [], {}, len(lengths), Sampling(1.0, max(lengths), []), 0)
    rollouts = [
        Rollout.of_completion(
            tokens=one,
            behaviour_logprobs=np.zeros(len(one), np.float32),
            version_spans=[VersionSpan(1, 0, len(one))],
            reward=0.0,
            finish_reason="stop",
        )
        for one in (np.array(tokens, np.int32) for tokens in completions)
    ]
    group = Group(ticket, rollouts, "benchmark", Timings(0, 0, 0))
    return [Sample(group, rollout, 1.0, np.zeros(rollout.num_trained_tokens, np.int64)) for rollout in rollouts]


def padded(prompt: int, lengths: list[int]) -> tuple[Tensor, list[int]]:
    tokens, completions = tokens_of(prompt, lengths)
    longest = max(lengths)
    return torch.tensor([tokens + one + [0] * (longest - len(one)) for one in completions]), lengths


def logprobs(kind: str) -> Row:
    command = [sys.executable, "-m", "benchmarks.learner.throughput", "--logprobs", kind]
    found: Row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def logprobs_once(kind: str) -> Row:
    """One forward and backward pass, in a fresh process."""
    torch.manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, device=DEVICE, requires_grad=True)
    weight = (torch.randn(VOCABULARY, HIDDEN, device=DEVICE) / 16).requires_grad_()
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    targets = torch.randint(VOCABULARY, (NUM_TOKENS,), device=DEVICE)
    temperature = torch.ones(NUM_TOKENS, device=DEVICE)
    chunk = LearnerConfig().chunk_tokens(DEVICE.type)
    if kind == "without entropy":
        learner_logprobs._softmax_statistics = sums_alone
    before, started = held_bytes(), now()
    if kind == "whole":
        found = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    else:
        found = learner_logprobs.score_tokens(hidden, weight, targets, temperature, chunk).logprobs
    found.sum().backward()
    seconds = now() - started
    return {"kind": "logprobs", "who": kind, "seconds": seconds, "peak_bytes": peak_bytes() - before}


def sums_alone(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics that log-probabilities need, without the entropy, in the same parts."""
    found = []
    for rows in logits.split(-(-len(logits) // learner_logprobs.NUM_PARTS)):
        top = rows.amax(dim=1, keepdim=True)
        found.append((top.squeeze(1), rows.sub_(top).exp_().sum(dim=1)))
    tops, totals = zip(*found, strict=True)
    return torch.cat(tops), torch.cat(totals), torch.zeros(len(logits), device=logits.device)


def held_bytes() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The peak of this program only; `ru_maxrss` would include its parent's."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(said_in(Path("/proc/self/status"), "VmHWM").split()[0]) * 1024


def report(rows: list[Row], console: Console) -> None:
    for shape in SHAPES:
        found = [row for row in rows if row.get("shape") == shape]
        ours, theirs = ([row["tokens_per_s"] for row in found if row["who"] == who] for who in ("ours", "padded"))
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        apart = max(row["gradients_apart"] for row in found)
        console.print(
            f"{shape}: {np.median(ours):,.0f} tokens/s against {np.median(theirs):,.0f} padded: "
            f"{np.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}); gradients apart by {apart:.1e}"
        )
    for name, unit, scale in (("seconds", "s", 1.0), ("peak_bytes", "GB", 1e9)):
        by = {
            who: [row[name] / scale for row in rows if row["kind"] == "logprobs" and row["who"] == who] for who in KINDS
        }
        for other, what in (("whole", "with all logits"), ("without entropy", "without the entropy")):
            ratios = sorted(a / b for a, b in zip(by["chunked"], by[other], strict=True))
            console.print(
                f"log-probabilities, {name}: {np.median(by['chunked']):.2f} {unit} against {np.median(by[other]):.2f} "
                f"{what}: {np.median(ratios):.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%})"
            )


if __name__ == "__main__":
    main()
