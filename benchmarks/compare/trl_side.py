"""TRL's side of the comparison: its own Python environment, and runs of benchmarks.compare.trl_run in it."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare.runs import Outcome, Workload, spec_of
from benchmarks.demo import ROOT
from headrace.common.config import RunConfig
from headrace.common.hardware.device import resolve_device
from headrace.common.tasks import Prompt, load_task

ENVIRONMENT = ROOT / "benchmarks" / ".trl-venv"
REQUIREMENTS = ROOT / "benchmarks" / "compare" / "trl-requirements.txt"
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
"""Without these settings the C library returns large tensors to the kernel at each generation step, which zeroes their
pages again: most of TRL's time on the heavy tail."""
ALONE = {
    "use_vllm": False,  # it has no build for a CPU: transformers generates in the process
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_environment() -> Path:
    """The environment's Python; it is rebuilt when the requirements have changed. `TORCH_INDEX` as for `make setup`."""
    python, installed = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if not installed.exists() or installed.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
        command = [str(python), "-m", "pip", "install", "--quiet", *index, "--requirement", str(REQUIREMENTS)]
        subprocess.run(command, check=True)
        installed.write_text(REQUIREMENTS.read_text())
    return python


def run(workload: Workload, config: RunConfig, folder: Path, num_threads: int) -> Outcome:
    """Runs TRL with the settings of `config`, which is Headrace's; the policies are left in `folder`."""
    folder.mkdir(parents=True)
    spec, out = folder / "spec.json", folder / "out.json"
    spec.write_text(json.dumps(spec_for(workload, config, num_threads)))
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"} | KEEPS_MEMORY
    command = [str(make_environment()), "-m", "benchmarks.compare.trl_run", str(spec), str(out)]
    with tempfile.TemporaryFile() as said:
        ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        if ended.returncode:
            said.seek(0)
            raise RuntimeError(f"TRL ended with {ended.returncode}:\n{said.read().decode(errors='replace')[-3000:]}")
    rows = json.loads(out.read_text())["rows"]
    policies = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    return Outcome("trl", num_threads, rows, policies)


def spec_for(workload: Workload, config: RunConfig, num_threads: int) -> dict[str, Any]:
    """A batch is generated at once, and trained in as many updates as Headrace takes per batch."""
    completions = config.learner.groups_per_step * config.actor.group_size
    updates = config.actor.num_mini_batches
    micro_batch = min(workload.trl_micro_batch, completions // updates)
    parts = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": completions // updates // micro_batch,
        "steps_per_generation": completions // micro_batch,
        "logging_steps": updates,
        "use_cpu": resolve_device(config.learner.device) == "cpu",
    }
    return {
        "model": config.model.location,
        "task": [config.task.name, config.task.settings],
        "prompts": list(prompts_of(config)),
        "num_threads": num_threads,
        "updates_per_batch": updates,
        "save_every": workload.save_every,
        "config": spec_of(config) | parts | ALONE,
    }


def prompts_of(config: RunConfig) -> list[dict[str, Any]]:
    """The prompts of the Headrace run, in the same order."""
    task = load_task(config.task.name, config.task.settings)
    wanted = config.learner.steps * config.learner.groups_per_step
    prompts = itertools.islice(task.prompts("train", seed=config.seed, epoch=0), wanted)
    return [
        {"prompt": prompt.messages, "answer": prompt.reference["answer"]}
        for prompt in prompts
        if isinstance(prompt, Prompt)
    ]
