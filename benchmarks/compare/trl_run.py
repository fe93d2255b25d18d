"""One run of TRL's `GRPOTrainer`, in TRL's own environment: `python -m benchmarks.compare.trl_run SPEC OUT`.

It uses nothing of Headrace but the task's reward. SPEC is JSON with a model's folder, a task, prompts with their
answers, `GRPOConfig` arguments, the number of updates per batch, and the number of threads. OUT is JSON with a row per
batch and the seconds since training began. Every `save_every` batches the policy is saved beside it, which is timed as
well.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from headrace.common.tasks import RewardTask, load_task
from headrace.common.wire import Sampling, Ticket

LOGGED = {
    "reward_mean": "reward",
    "uniform_share": "frac_reward_zero_std",
    "completion_tokens_mean": "completions/mean_length",
    "completion_tokens_max": "completions/max_length",
}


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Records the rows of batches and saves policies."""

    def __init__(self, folder: Path, updates_per_batch: int, save_every: int) -> None:
        self.folder, self.updates_per_batch, self.save_every = folder, updates_per_batch, save_every
        self.rows: list[dict[str, Any]] = []
        self.started = self.cpu_started = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started, self.cpu_started = time.monotonic(), time.process_time()

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, model: Any = None, **__: Any) -> None:
        step, updates = divmod(state.global_step, self.updates_per_batch)
        if updates:
            return
        if step % self.save_every == 0:
            model.save_pretrained(self.folder / f"step-{step}")
        spent = {"wall_s": time.monotonic() - self.started, "cpu_s": time.process_time() - self.cpu_started}
        self.rows.append({"step": step, **spent})

    def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
        """TRL's numbers of the batch that has just ended."""
        if self.rows and "reward" in logs:
            self.rows[-1] |= {ours: logs[theirs] for ours, theirs in LOGGED.items()}


def reward_of(task_name: str, settings: dict[str, Any]) -> Callable[..., list[float]]:
    task = cast(RewardTask, load_task(task_name, settings))

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return list(map(score, texts, answer))

    def score(text: str, answer: str) -> float:
        given = task.reward(text, ticket_of(answer))
        assert isinstance(given, float), "the compared tasks have synchronous rewards"
        return given

    return reward


def ticket_of(answer: str) -> Ticket:
    """A ticket with the fields that a reward uses."""
    return Ticket("0-0", "train", [], [], {"answer": answer}, 1, Sampling(1.0, 1, []), 0)


def main() -> None:
    spec, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(spec["num_threads"])
    clock = Clock(out.parent, spec["updates_per_batch"], spec["save_every"])
    trainer = GRPOTrainer(
        model=spec["model"],
        reward_funcs=reward_of(*spec["task"]),
        args=GRPOConfig(output_dir=str(out.parent / "trainer"), **spec["config"]),
        train_dataset=Dataset.from_list(spec["prompts"]),
        callbacks=[clock],
    )
    trainer.train()
    out.write_text(json.dumps({"torch": torch.__version__, "rows": clock.rows}) + "\n")


if __name__ == "__main__":
    main()
