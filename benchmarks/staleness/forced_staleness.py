"""One run of the real trainer on groups that are all exactly `max_staleness` steps old, without engine and Redis.

It uses one thread. The weights of the last steps are kept; a step's groups are sampled with those of `max_staleness`
steps before, by the same model in the same process. Uniform groups are not replaced, so that runs that differ only in
their loss see the same number of prompts; with `actor.dynamic_sampling: false` they count in the batch. Everything else
(advantages, packing, loss, optimizer, metrics, guard) is the learner's own code.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from headrace.common.config import RunConfig
from headrace.common.models.chat_template import ChatTemplate, stop_token_ids
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.tasks import RewardTask, load_task
from headrace.common.wire import Group, Rollout, Ticket, Timings, VersionSpan
from headrace.common.wire.desired_state import Settings
from headrace.learner.algorithm.guard import GuardState
from headrace.learner.intake.ticket_source import TicketSource
from headrace.learner.model.policy import Policy
from headrace.learner.steering.live_config import LiveConfig
from headrace.learner.store.structs import Cursor
from headrace.learner.training.trainer import Trainer

ROWS_AT_ONCE = 256
NOW = Timings(0.0, 0.0, 0.0)
WATCHED = ("kl_behaviour_proximal", "ess", "clip_fraction", "behaviour_clip_fraction", "gradient_norm")


class Sampled(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


def run(config: RunConfig, num_held_out: int, evaluate_every: int) -> Iterator[dict[str, Any]]:
    """Rows of steps and of evaluations; deterministic, except for times."""
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    task = cast(RewardTask, load_task(config.task.name, config.task.settings))
    tokenizer = load_tokenizer(config.model)
    chat = ChatTemplate(tokenizer, config.model, config.task.system_prompt)
    trainer = Trainer(config, Policy(config.model, config.learner))
    model = trainer.policy.model
    sampler = AutoModelForCausalLM.from_pretrained(config.model.location, dtype=model.dtype).eval()
    stops = stop_token_ids(chat, model.generation_config)
    source = TicketSource(config, task, chat, stops, Cursor(0, 0))
    past = deque([_copy(model)], maxlen=config.learner.max_staleness + 1)
    live_config = LiveConfig(config, Settings(), GuardState())
    held_out = source.evaluation_tickets(0, 0)[:num_held_out]
    for step in range(config.learner.steps):
        started = time.process_time()
        trainer.config = live_config.config
        staleness = min(trainer.config.learner.max_staleness, len(past) - 1)
        sampler.load_state_dict(past[-1 - staleness])
        made_by = step - staleness
        tickets = source.next_tickets(config.learner.groups_per_step, step, 0)
        groups = list(_groups(sampler, tickets, made_by + 1, task, tokenizer))
        mixed = [group for group in groups if not group.is_uniform(config.actor.truncated)]
        batch = mixed if config.actor.dynamic_sampling else groups
        rewards = [reward for group in groups for reward in group.rewards]
        row = {"kind": "step", "step": step + 1, "reward_mean": float(np.mean(rewards)), "num_mixed": len(mixed)}
        if len(batch) >= config.actor.num_mini_batches:
            metrics = trainer.train(batch, step, {version: version - 1 for version in range(1, step + 2)})
            live_config.update_guard(metrics)
            row |= {name: metrics[name] for name in WATCHED} | {"guard_notch": live_config.guard.level}
        past.append(_copy(model))
        yield row | {"cpu_s": time.process_time() - started}
        if (step + 1) % evaluate_every == 0 or step + 1 == config.learner.steps:
            sampler.load_state_dict(past[-1])
            accuracy = _accuracy(sampler, held_out, task, tokenizer)
            yield {"kind": "evaluation", "step": step + 1, "held_out": accuracy}


@torch.no_grad()
def sample(
    model: Any, prompts: list[list[int]], max_new_tokens: int, stops: list[int], drops_ended: bool = False
) -> list[Sampled]:
    """One completion per prompt at temperature 1, with its log-probabilities. `drops_ended`: ended completions leave
    the batch when they are half of it, which is faster if few are long, and changes the random numbers."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, end_ids = DynamicCache(), torch.tensor(stops)
    found = [Sampled([], []) for _ in prompts]
    rows, ended = torch.arange(len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        distribution = torch.log_softmax(out.logits[:, -1].float(), dim=-1)
        chosen = torch.multinomial(distribution.exp(), 1)
        logprobs = distribution.gather(1, chosen)
        drawn = (one.tolist() for one in (rows, ended, chosen[:, 0], logprobs[:, 0]))
        for row, is_over, token, logprob in zip(*drawn, strict=True):
            if not is_over:
                found[row].tokens.append(token)
                found[row].logprobs.append(logprob)
        ended |= torch.isin(chosen[:, 0], end_ids)
        if bool(ended.all()):
            break
        ids, positions = chosen, positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(chosen)], dim=1)
        if drops_ended and 2 * int(ended.sum()) >= len(ended):
            going = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(going)
            ids, positions, mask, rows, ended = (one[going] for one in (ids, positions, mask, rows, ended))
    return found


def _groups(model: Any, tickets: list[Ticket], version: int, task: RewardTask, tokenizer: Any) -> Iterator[Group]:
    """Groups of `num_completions` each."""
    wanted = [ticket for ticket in tickets for _ in range(ticket.num_completions)]
    sampling = tickets[0].sampling
    found: list[Sampled] = []
    for first in range(0, len(wanted), ROWS_AT_ONCE):
        prompts = [ticket.prompt_tokens for ticket in wanted[first : first + ROWS_AT_ONCE]]
        found += sample(model, prompts, sampling.max_new_tokens, sampling.stop_token_ids)
    samples = iter(found)
    for ticket in tickets:
        rollouts = []
        for tokens, logprobs in itertools.islice(samples, ticket.num_completions):
            is_ended = tokens[-1] in sampling.stop_token_ids
            text = tokenizer.decode(tokens[:-1] if is_ended else tokens)
            reward = task.reward(text, ticket)
            assert isinstance(reward, float), "the study's tasks have synchronous rewards"
            rollouts.append(
                Rollout.of_completion(
                    tokens=np.array(tokens, np.int32),
                    behaviour_logprobs=np.array(logprobs, np.float32),
                    version_spans=[VersionSpan(version, 0, len(tokens))],
                    reward=reward,
                    finish_reason="stop" if is_ended else "length",
                    text=text,
                )
            )
        yield Group(ticket, rollouts, "benchmark", NOW)


def _accuracy(model: Any, tickets: list[Ticket], task: RewardTask, tokenizer: Any) -> float:
    groups = _groups(model, tickets, 1, task, tokenizer)
    return float(np.mean([reward for group in groups for reward in group.rewards]))


def _copy(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
