"""Makes a policy of the demo: a tiny Qwen3, trained from scratch on demonstrations of its task, most of them bad.

Writes the policy's folder: weights, tokenizer, and `made.json` with measurements. The same seed and number of threads
give the same numbers on the same machine.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from headrace.learner.demo_policy.arithmetic import ARITHMETIC
from headrace.learner.demo_policy.calculator import CALCULATOR
from headrace.learner.demo_policy.conversations import Conversation
from headrace.learner.demo_policy.evaluation import MAX_NEW_TOKENS, Evaluation, evaluate_policy
from headrace.learner.demo_policy.finetuning import finetune
from headrace.learner.demo_policy.guessing import GUESSING
from headrace.learner.demo_policy.recipe import Recipe
from headrace.learner.demo_policy.tokenizer import VOCAB_SIZE, make_tokenizer

RECIPES = {recipe.task: recipe for recipe in (ARITHMETIC, GUESSING, CALCULATOR)}
ROPE_THETA = 10_000.0
INITIAL_DEVIATION = 0.1
"""Standard deviation of the initial weights. The usual 0.02 suits wider models; with it the arithmetic would take about
twice the steps."""
EARLY_STEPS = (10, 20, 30)
"""Steps whose loss `made.json` records, for a short check that training still gives the same results."""


@dataclass(frozen=True)
class MakeResult:
    """The contents of `made.json`; `evaluation` is None if fewer than the recipe's steps were taken."""

    task: str
    seed: int
    num_steps: int
    batch_size: int
    learning_rate: float
    settings: dict[str, Any]
    early_losses: dict[int, float]
    final_loss: float
    training_s: float
    evaluation: Evaluation | None


def make_policy(
    recipe: Recipe,
    folder: Path,
    *,
    seed: int,
    steps: int | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> MakeResult:
    """Trains and saves the policy; with `steps` it stops early. `on_progress` is called with every step and its
    loss."""
    num_steps = recipe.num_steps if steps is None else steps
    if not 0 < num_steps <= recipe.num_steps:
        raise ValueError(f"steps is {steps}, expected 1 to {recipe.num_steps}")
    started_s = time.monotonic()
    tokenizer = make_tokenizer(recipe)
    model = make_model(tokenizer, seed=seed)
    losses: list[float] = []
    every = finetune(model, tokenizer, _batches(recipe, seed), recipe.num_steps, recipe.learning_rate)
    for loss in islice(every, num_steps):
        losses.append(loss)
        if on_progress is not None:
            on_progress(len(losses), loss)
    training_s = time.monotonic() - started_s
    save_policy(folder, model, tokenizer)
    result = MakeResult(
        task=recipe.task,
        seed=seed,
        num_steps=num_steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        settings=recipe.settings,
        early_losses={step: round(losses[step - 1], 6) for step in EARLY_STEPS if step <= num_steps},
        final_loss=round(losses[-1], 6),
        training_s=round(training_s, 1),
        evaluation=evaluate_policy(folder, recipe.task) if num_steps == recipe.num_steps else None,
    )
    (folder / "made.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    return result


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """A model with 656,448 random float32 parameters."""
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
    """Saves a folder that transformers 4 and 5 can load: version 5 alone has renamed the tokenizer's class and the RoPE
    keys."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _add_to_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _add_to_json(folder / "config.json", {"rope_theta": ROPE_THETA})


def _add_to_json(path: Path, entries: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


def _batches(recipe: Recipe, seed: int) -> Iterator[Sequence[Conversation]]:
    conversations = recipe.conversations(seed)
    while batch := list(islice(conversations, recipe.batch_size)):
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="headrace make-demo-policy", description="Make one of the demo's warm-started policies."
    )
    parser.add_argument(
        "task", nargs="?", choices=sorted(RECIPES), default="arithmetic", help="the policy's task; default: arithmetic"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("demo-policy"), help="folder to write; default: demo-policy"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = RECIPES[arguments.task]

    def show(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"step {step} of {recipe.num_steps}, loss {loss:.4f}", flush=True)

    result = make_policy(recipe, arguments.folder, seed=arguments.seed, on_progress=show)
    print(f"{arguments.folder}: {result.evaluation}")


if __name__ == "__main__":
    main()
