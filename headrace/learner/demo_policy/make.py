"""Makes the demo policy: a tiny Qwen3, trained from scratch, with correct arithmetic and a mostly wrong strategy.

Owns the recipe and the folder that it writes: weights, tokenizer, and `made.json` with measurements. The same seed and
number of threads give the same numbers on the same machine. Most demonstrations contain a slip, which leaves something
to learn for reinforcement learning: groups are mixed, and the policy can find the right strategy.
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
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from headrace.common.tasks import Prompt
from headrace.common.tasks.arithmetic import Problem, train_problems
from headrace.learner.demo_policy.evaluation import Evaluation, evaluate_policy
from headrace.learner.demo_policy.finetuning import finetune
from headrace.learner.demo_policy.tokenizer import VOCAB_SIZE, make_tokenizer

NUM_STEPS = 2000
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
SLIP_SHARE = 0.7
"""Share of demonstrations with a slip: it makes pass@1 about 0.3, once the arithmetic is learned."""
MAX_NEW_TOKENS = 32
ROPE_THETA = 10_000.0
INITIAL_DEVIATION = 0.1
"""Standard deviation of the initial weights. The usual 0.02 suits wider models; with it the arithmetic would take about
twice the steps."""
EARLY_STEPS = (10, 20, 30)
"""Steps whose loss `made.json` records, for a short check that training still gives the same results."""


@dataclass(frozen=True)
class MakeResult:
    """The contents of `made.json`; `evaluation` is None if fewer than `NUM_STEPS` steps were taken."""

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
) -> MakeResult:
    """Trains and saves the policy; with `steps` it stops early. `on_progress` is called with every step and its
    loss."""
    num_steps = NUM_STEPS if steps is None else steps
    if not 0 < num_steps <= NUM_STEPS:
        raise ValueError(f"steps is {steps}, expected 1 to {NUM_STEPS}")
    started_s = time.monotonic()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    losses: list[float] = []
    for loss in islice(finetune(model, tokenizer, _batches(seed), NUM_STEPS, LEARNING_RATE), num_steps):
        losses.append(loss)
        if on_progress is not None:
            on_progress(len(losses), loss)
    training_s = time.monotonic() - started_s
    save_policy(folder, model, tokenizer)
    result = MakeResult(
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


def _batches(seed: int) -> Iterator[list[tuple[Prompt, str]]]:
    rng = random.Random(f"slips {seed}")
    problems = train_problems(seed=seed, epoch=0)
    while batch := [(problem.prompt, _worked_answer(problem, rng)) for problem in islice(problems, BATCH_SIZE)]:
        yield batch


def _worked_answer(problem: Problem, rng: random.Random) -> str:
    return rng.choice(problem.slips) if rng.random() < SLIP_SHARE else problem.demonstration


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

    result = make_policy(arguments.folder, seed=arguments.seed, on_progress=show)
    print(f"{arguments.folder}: {result.evaluation}")


if __name__ == "__main__":
    main()
