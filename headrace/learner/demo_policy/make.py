"""Makes the demo policy: a tiny Qwen3 with right arithmetic and mostly wrong strategy, supervised from scratch.

Owns the recipe and the made folder: weights, tokenizer, and `made.json` with what the making measured. The same
seed and number of threads give the same numbers on the same machine. Reinforcement learning has something to do
because most demonstrations are slips: groups are mixed, and the right strategy is within the policy's reach.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from headrace.common.tasks import Prompt
from headrace.common.tasks.arithmetic import Problem, train_problems
from headrace.learner.demo_policy.evaluation import Evaluation, evaluate_policy
from headrace.learner.demo_policy.tokenizer import VOCAB_SIZE, make_tokenizer

NUM_STEPS = 2000
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
SLIP_SHARE = 0.7
"""Of the demonstrations: what makes pass@1 about 0.3, once the arithmetic is learned."""
ADAM_BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
MAX_NEW_TOKENS = 32
ROPE_THETA = 10_000.0
INITIAL_DEVIATION = 0.1
"""Of the random weights. The usual 0.02 is for wider models: with it the arithmetic takes about twice the steps."""
IGNORED = -100
EARLY_STEPS = (10, 20, 30)
"""Steps whose loss `made.json` records, for a short check that the making still goes the same way."""


@dataclass(frozen=True)
class Made:
    """What `made.json` holds; `evaluation` is missing if the making was cut short."""

    seed: int
    num_steps: int
    batch_size: int
    learning_rate: float
    slip_share: float
    early_losses: dict[int, float]
    final_loss: float
    training_s: float
    evaluation: Evaluation | None


def make_policy(
    folder: Path, *, seed: int, steps: int | None = None, on_progress: Callable[[int, float], None] | None = None
) -> Made:
    """Makes and saves the policy; `steps` cuts the making short. `on_progress` is told every step and its loss."""
    num_steps = NUM_STEPS if steps is None else steps
    if not 0 < num_steps <= NUM_STEPS:
        raise ValueError(f"steps is {steps}, expected 1 to {NUM_STEPS}")
    started_s = time.monotonic()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    losses: list[float] = []
    for loss in islice(supervised(model, tokenizer, _batches(seed), NUM_STEPS, LEARNING_RATE), num_steps):
        losses.append(loss)
        if on_progress is not None:
            on_progress(len(losses), loss)
    training_s = time.monotonic() - started_s
    save_policy(folder, model, tokenizer)
    made = Made(
        seed=seed,
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        slip_share=SLIP_SHARE,
        early_losses={step: round(losses[step - 1], 6) for step in EARLY_STEPS if step <= num_steps},
        final_loss=round(losses[-1], 6),
        training_s=round(training_s, 1),
        evaluation=evaluate_policy(folder) if num_steps == NUM_STEPS else None,
    )
    (folder / "made.json").write_text(json.dumps(asdict(made), indent=2) + "\n")
    return made


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """656,448 random float32 parameters."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=INITIAL_DEVIATION,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def save_policy(folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Saves what transformers 4 and 5 both load: version 5 alone renamed the tokenizer's class and the RoPE keys."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _add_to_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _add_to_json(folder / "config.json", {"rope_theta": ROPE_THETA})


def _add_to_json(path: Path, entries: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


def supervised(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterator[list[tuple[Prompt, str]]],
    num_steps: int,
    learning_rate: float,
) -> Iterator[float]:
    """Takes one step, on one batch of prompts and their worked answers, for each loss that is asked for.

    `learning_rate` is that of the first step; it falls linearly to zero at `num_steps`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
    for step, batch in enumerate(islice(batches, num_steps)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / num_steps)
        loss = completion_loss(model, *encode(tokenizer, batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        yield loss.item()


def _batches(seed: int) -> Iterator[list[tuple[Prompt, str]]]:
    rng = random.Random(f"slips {seed}")
    problems = train_problems(seed=seed, epoch=0)
    while batch := [(problem.prompt, _worked_answer(problem, rng)) for problem in islice(problems, BATCH_SIZE)]:
        yield batch


def _worked_answer(problem: Problem, rng: random.Random) -> str:
    return rng.choice(problem.slips) if rng.random() < SLIP_SHARE else problem.demonstration


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[tuple[Prompt, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (B, T) int64, padded on the right; only completion tokens have a label."""
    prompts = [
        tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        for prompt, _ in batch
    ]
    completions = [worked_answer + str(tokenizer.eos_token) for _, worked_answer in batch]
    rows = list(zip(tokenizer(prompts).input_ids, tokenizer(completions).input_ids, strict=True))
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def completion_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens. Padding comes last, so causal attention needs no other mask."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    return cross_entropy(model.lm_head(hidden[labelled]), targets[labelled])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="headrace make-demo-policy", description="Make the demo's warm-started policy."
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("demo-policy"), help="folder to write; default: demo-policy"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def show(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"step {step} of {NUM_STEPS}, loss {loss:.4f}", flush=True)

    made = make_policy(arguments.folder, seed=arguments.seed, on_progress=show)
    print(f"{arguments.folder}: {made.evaluation}")


if __name__ == "__main__":
    main()
