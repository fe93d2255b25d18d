"""Measures a demo policy on held-out prompts: pass@1, greedy accuracy, and the share of mixed groups.

It samples with transformers only, so that it can serve as a reference for the services' sampling. The same seed and
number of threads give the same numbers on the same machine.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.common.environments import Chat
from headrace.common.tasks import Outcome, Prompt, load_task
from headrace.common.wire import Sampling, Ticket
from headrace.learner.demo_policy.sampling import Sampler

BATCH_PROMPTS = 128
GROUP_SIZE = 4
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Evaluation:
    """Results between 0 and 1. A group is mixed if some, but not all, of its `GROUP_SIZE` rewards are 1."""

    num_prompts: int
    samples: int
    pass_at_1: float
    greedy_accuracy: float
    mixed_share: float | None


def evaluate_policy(folder: Path, task: str, num_prompts: int = 1024, samples: int = 4, *, seed: int = 0) -> Evaluation:
    """Evaluates on the first `num_prompts` held-out prompts of a task, `samples` times each at temperature 1.

    `mixed_share` is None if `samples` is below `GROUP_SIZE`.
    """
    prompts = list(islice(load_task(task, {}).prompts("held_out", seed=0, epoch=0), num_prompts))
    if not 0 < num_prompts <= len(prompts):
        raise ValueError(f"num_prompts is {num_prompts}, but there are {len(prompts)} held-out prompts")
    rewards = _Rewards(folder, task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = torch.cat(list(rewards.of(prompts, samples, greedy=False)))
    greedy = torch.cat(list(rewards.of(prompts, 1, greedy=True)))
    num_right = sampled[:, :GROUP_SIZE].sum(dim=1)
    mixed = ((num_right > 0) & (num_right < GROUP_SIZE)).double().mean().item()
    return Evaluation(
        num_prompts=num_prompts,
        samples=samples,
        pass_at_1=round(sampled.mean().item(), 4),
        greedy_accuracy=round(greedy.mean().item(), 4),
        mixed_share=round(mixed, 4) if samples >= GROUP_SIZE else None,
    )


class _Rewards:
    def __init__(self, folder: Path, task: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.task: Any = load_task(task, {})

    def of(self, prompts: list[Any], samples: int, *, greedy: bool) -> Iterator[torch.Tensor]:
        """Rewards `(B, samples)` of each batch of prompts."""
        for start in range(0, len(prompts), BATCH_PROMPTS):
            batch = prompts[start : start + BATCH_PROMPTS]
            sampler = Sampler(self.model, self.tokenizer, greedy=greedy, max_new_tokens=MAX_NEW_TOKENS)
            episodes = [prompt for prompt in batch for _ in range(samples)]
            rewards = asyncio.run(self._play(episodes, sampler))
            yield torch.tensor(rewards, dtype=torch.float64).view(len(batch), samples)

    async def _play(self, prompts: list[Prompt], sampler: Sampler) -> list[float]:
        sampler.num_running = len(prompts)
        return await asyncio.gather(*(self._reward(prompt, sampler) for prompt in prompts))

    async def _reward(self, prompt: Prompt, sampler: Sampler) -> float:
        """Of one episode, or of one completion if the task has no `rollout`."""
        chat = Chat(sampler.send, prompt.messages, prompt.tools, base_url="", api_key="", model="")
        try:
            if not hasattr(self.task, "rollout"):
                return float(self.task.reward((await chat.reply()).text, self._ticket(prompt)))
            outcome: Outcome = await self.task.rollout(chat, self._ticket(prompt))
            return outcome.reward
        finally:
            sampler.end_episode()

    def _ticket(self, prompt: Prompt) -> Ticket:
        return Ticket(
            id="evaluation",
            kind="eval",
            prompt_tokens=[],
            messages=prompt.messages,
            reference=prompt.reference,
            tools=prompt.tools,
            num_completions=1,
            sampling=Sampling(1.0, MAX_NEW_TOKENS, [self.tokenizer.eos_token_id]),
            min_weight_version=0,
        )
