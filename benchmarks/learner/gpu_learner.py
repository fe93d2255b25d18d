"""The learner on a machine with torch and transformers, without SGLang and without a network (gpu_learner.sh).

    python -m benchmarks.learner.gpu_learner prepare FOLDER --shape qwen2.5-1.5b  # any machine: a recording, a model
    python -m benchmarks.learner.gpu_learner run FOLDER --dtype bfloat16          # `headrace replay`: seconds, memory
    python -m benchmarks.learner.gpu_learner resume FOLDER --dtype bfloat16       # in two halves, or straight

The recording is artificial: groups of completions with heavy-tailed lengths. Their behaviour log-probabilities are
those of a model that gives every token the same probability, as a random model about does. Memory is sampled every 0.1
s: on a GPU the memory that nvidia-smi reports beyond what was in use before, on a CPU the resident bytes of the
learner's processes.
"""

import argparse
import contextlib
import json
import math
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.demo import ROOT
from headrace.common.wire import Group, Rollout, Sampling, Ticket, Timings, VersionSpan, encode
from headrace.learner.intake.recordings import Header, RecordedGroup, RecordingWriter

Shape = dict[str, Any]
TOKENIZER = ROOT / "headrace" / "demo" / "policy"
TOKENIZER_TOKENS = 500
SHAPES: dict[str, Shape] = {
    "qwen2.5-1.5b": {
        "model": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
        | {"num_key_value_heads": 2, "vocab_size": 151_936},
        "prompt": (100, 200), "completion": (20, 512), "group_size": 8, "groups_per_step": 16,
        "micro_batch_tokens": 10_240,
    },
    "tiny": {
        "model": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "vocab_size": 640},
        "prompt": (5, 10), "completion": (2, 12), "group_size": 4, "groups_per_step": 2,
        "micro_batch_tokens": 128,
    },
}  # fmt: skip
NUM_STEPS = 4
SHOWN = ("gradient_norm", "kl_behaviour", "ess", "proximal_s", "train_s")
SAMPLE_S = 0.1
MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learner.gpu_learner")
    parser.add_argument("what", choices=["prepare", "run", "resume"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    arguments = parser.parse_args()
    if arguments.what == "prepare":
        prepare(arguments.folder, SHAPES[arguments.shape])
    elif arguments.what == "run":
        run(arguments.folder, arguments.dtype)
    else:
        return resume(arguments.folder, arguments.dtype)
    return 0


def prepare(folder: Path, shape: Shape) -> None:
    """Writes `model/`, `recipe.yaml` and `recording.msgpack`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **shape["model"], tie_word_embeddings=True, max_position_embeddings=4096)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 1, 0, None
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    for file in TOKENIZER.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder / "model")
    recipe = recipe_of(folder, shape)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record(folder / "recording.msgpack", recipe, shape)
    size = sum(file.stat().st_size for file in (folder / "model").iterdir()) / 1e9
    print(f"{folder}: a random model of {size:.2f} GB in bfloat16, and groups for {NUM_STEPS} steps")


def recipe_of(folder: Path, shape: Shape) -> dict[str, Any]:
    learner = {"steps": NUM_STEPS, "groups_per_step": shape["groups_per_step"], "checkpoint_interval_steps": 2}
    return {
        "model": {"path": str((folder / "model").resolve())},
        "task": {"name": "arithmetic"},
        "actor": {"group_size": shape["group_size"], "num_mini_batches": 2, "divergence_guard": "warn"},
        "sampling": {"max_new_tokens": shape["completion"][1]},
        "learner": learner | {"micro_batch_tokens": shape["micro_batch_tokens"]},
        "evaluation": {"interval_steps": 0},
        "durability": "relaxed",
    }


def record(path: Path, recipe: dict[str, Any], shape: Shape) -> None:
    path.unlink(missing_ok=True)
    writer, rng = RecordingWriter(path, Header("made-up", recipe)), random.Random(0)
    writer.add_versions({version: version - 1 for version in range(1, NUM_STEPS + 2)})
    for place in range(NUM_STEPS * shape["groups_per_step"]):
        group = group_of(rng, place, shape)
        writer.add(RecordedGroup(f"{place + 1}-0", group.ticket.id, encode(group)))
    writer.close()


def group_of(rng: random.Random, place: int, shape: Shape) -> Group:
    """A group sampled by the version before the step that trains it; never uniform."""
    size, version = shape["group_size"], 1 + place // shape["groups_per_step"]
    shortest, longest = shape["completion"]
    sampling = Sampling(temperature=1.0, max_new_tokens=longest, stop_token_ids=[1])
    prompt = [rng.randrange(5, TOKENIZER_TOKENS) for _ in range(rng.randint(*shape["prompt"]))]
    messages = [{"role": "user", "content": "made up"}]
    ticket = Ticket(f"0-{place}", "train", prompt, messages, {"answer": "1"}, size, sampling, 1)
    rollouts = []
    for number in range(size):
        length = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
        rollouts.append(
            Rollout.of_completion(
                tokens=np.array([rng.randrange(5, TOKENIZER_TOKENS) for _ in range(length)], np.int32),
                behaviour_logprobs=np.full(length, -math.log(shape["model"]["vocab_size"]), np.float32),
                version_spans=[VersionSpan(version, 0, length)],
                reward=float(number % 2),
                finish_reason="stop",
            )
        )
    return Group(ticket, rollouts, "made-up", Timings(1.0, 2.0, 3.0))


def run(folder: Path, dtype: str) -> None:
    """Replays all steps without interruption, in separate processes; prints a row per step and the peak of memory."""
    peak = replay(folder, dtype, dtype, NUM_STEPS)
    print(f"{dtype}: peak of memory while {NUM_STEPS} steps ran: {peak / MIB:,.0f} MiB ({measured_by()})")
    for row in rows_of(folder, dtype):
        told = "  ".join(f"{name} {row[name]:.6g}" for name in SHOWN if isinstance(row.get(name), int | float))
        print(f"{dtype}: step {row['step']}  {told}")


def resume(folder: Path, dtype: str) -> int:
    """Replays half of the steps, then the rest in another process from the checkpoint; prints the difference to `run`'s
    policy."""
    name = f"{dtype}-resumed"
    for steps in (NUM_STEPS // 2, NUM_STEPS):
        replay(folder, dtype, name, steps)
    start, straight, resumed = (load_file(path / "model.safetensors") for path in policies(folder, dtype, name))
    moved, apart = distance(straight, start), distance(straight, resumed)
    share = "bit for bit the same" if apart == 0 else f"{apart:.3g} apart (2-norm), {apart / moved:.2%} of their way"
    half = f"{NUM_STEPS // 2} of {len(rows_of(folder, name))} steps"
    print(f"{dtype}: stopped after {half} and resumed: policies are {share}")
    return int(not (moved > 0 and apart < 0.1 * moved))


def policies(folder: Path, dtype: str, name: str) -> list[Path]:
    return [folder / "model", folder / "runs" / dtype / "policy", folder / "runs" / name / "policy"]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum((one[name].double() - other[name].double()).square().sum().item() for name in one))


def replay(folder: Path, dtype: str, name: str, steps: int) -> int:
    """Continues a run up to `steps`; returns the peak of memory in bytes. Raises if it fails."""
    if steps == NUM_STEPS and name == dtype:
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    settings = [f"model.dtype={dtype}", f"learner.steps={steps}"]
    command = [sys.executable, "-m", "headrace.launcher", "replay", str(folder / "recording.msgpack")]
    command += ["--config", str(folder / "recipe.yaml"), "--run", name, "--runs-folder", str(folder / "runs")]
    before = used_on_gpu()
    process = subprocess.Popen([*command, *(part for one in settings for part in ("--set", one))], cwd=ROOT)
    peak, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            peak[0] = max(peak[0], used_on_gpu() - before if torch.cuda.is_available() else resident(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    code = process.wait()
    ended.set()
    sampler.join()
    if code != 0:
        raise SystemExit(f"headrace replay ended with {code}: {' '.join(command)}")
    return peak[0]


def measured_by() -> str:
    return "nvidia-smi, context and caches included" if torch.cuda.is_available() else "resident, libraries included"


def used_on_gpu() -> int:
    """Bytes in use on the first GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return MIB * int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def resident(pid: int) -> int:
    """Resident bytes of the largest process among `pid` and its children."""
    sizes = [0]
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            sizes.append(process.memory_info().rss)
    return max(sizes)


def rows_of(folder: Path, name: str) -> Sequence[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


if __name__ == "__main__":
    sys.exit(main())
