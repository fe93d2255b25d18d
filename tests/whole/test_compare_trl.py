"""The comparison with TRL as far as it needs no TRL: the task, its grown policy, what both sides are told."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.compare import trl
from benchmarks.compare.runs import Outcome, spec_of
from benchmarks.compare.trl import LONG, SAME, SHORT, compare, ratios, settings_of, short
from benchmarks.compare.trl_side import spec_for
from benchmarks.tasks.growth import grown
from benchmarks.tasks.heavy_tail import MAX_NEW_TOKENS, HeavyTail, Selling
from headrace.common.config import RunConfig, load_recipe
from headrace.common.hardware.device import resolve_device
from headrace.common.tasks.arithmetic import score

ROOT = Path(__file__).parents[2]
DEMO_POLICY = ROOT / "headrace" / "demo" / "policy"


def recipe(path: str, *overrides: str) -> RunConfig:
    return load_recipe(ROOT / path, overrides).config


def test_worked_answers_are_of_20_to_512_tokens_with_a_heavy_tail() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_POLICY)
    some = list(itertools.islice(HeavyTail().problems("train", "0 0"), 2000))
    lengths = np.array([len(tokenizer(one.worked() + tokenizer.eos_token).input_ids) for one in some])
    assert lengths.min() >= 20
    assert lengths.max() <= MAX_NEW_TOKENS
    assert np.median(lengths) < 50
    assert (lengths > 4 * np.median(lengths)).mean() > 0.08
    slips = (slip for one in some for slip in one.slips)
    assert max(len(tokenizer(slip + tokenizer.eos_token).input_ids) for slip in slips) <= MAX_NEW_TOKENS


def test_a_problem_is_worked_in_a_line_for_each_time() -> None:
    one = Selling(3, 7, 17, "Ada", "eggs")
    assert one.worked() == "3:38 - 7 = 31\n2:31 - 7 = 24\n1:24 - 7 = 17\n#### 17"
    assert one.slips == [one.worked()[:-2] + told for told in ("24", "10")]
    assert one.prompt.messages[0]["content"] == "Ada has 38 eggs and sold 7 3 times. How many now?"
    answer = one.prompt.reference["answer"]
    assert score(one.worked(), answer) == 1.0
    assert [score(slip, answer) for slip in one.slips] == [0.0, 0.0]


def test_no_held_out_problem_is_ever_trained_on() -> None:
    held_out = {(one.times, one.taken, one.left) for one in HeavyTail().problems("held_out", "")}
    trained = {
        (one.times, one.taken, one.left) for one in itertools.islice(HeavyTail().problems("train", "0 0"), 20_000)
    }
    assert len(held_out) > 500
    assert not held_out & trained
    same = [list(itertools.islice(HeavyTail().prompts("held_out", seed=seed, epoch=seed), 20)) for seed in (0, 1)]
    assert same[0] == same[1]


def test_a_grown_policy_computes_the_same_and_can_learn_everywhere() -> None:
    small = AutoModelForCausalLM.from_pretrained(DEMO_POLICY).eval()
    large = grown(small).eval()
    assert 9e6 < sum(parameter.numel() for parameter in large.parameters()) < 12e6
    tokens = torch.randint(0, 500, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(small(tokens).logits, large(tokens).logits, atol=2e-3)
    large(tokens).logits.log_softmax(-1)[..., 7].sum().backward()
    written = [p for name, p in large.named_parameters() if name.endswith(("o_proj.weight", "down_proj.weight"))]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in written)


def test_trl_is_told_what_the_recipe_says() -> None:
    config = recipe(SHORT.recipe, "seed=3", *SAME)
    spec = spec_for(SHORT, config, num_threads=2)
    told = spec["config"]
    completions = config.learner.groups_per_step * config.actor.group_size
    a_batch = told["per_device_train_batch_size"] * told["steps_per_generation"]
    assert a_batch == completions == 128
    assert told["max_steps"] == 60 * spec["updates_per_batch"]
    assert told["steps_per_generation"] // told["gradient_accumulation_steps"] == config.actor.num_mini_batches
    assert (told["epsilon"], told["epsilon_high"]) == pytest.approx((0.067, 0.093))
    assert told["lr_scheduler_kwargs"]["lr_end"] == pytest.approx(4e-5)
    assert len(spec["prompts"]) == 60 * 16
    assert not config.actor.dynamic_sampling
    spec_of(recipe(LONG.recipe))
    with pytest.raises(ValueError, match="token_mean"):
        spec_of(recipe(SHORT.recipe, "actor.loss_aggregation=token_mean"))


def test_by_another_recipe_seconds_a_batch_alone_are_compared() -> None:
    workload = short("benchmarks/compare/gpu.yaml")
    spec = spec_for(workload, recipe(workload.recipe, "task.name=arithmetic", *SAME), num_threads=4)
    assert (workload.name, workload.target, spec["model"]) == ("gpu", None, "Qwen/Qwen2.5-1.5B-Instruct")
    assert spec["task"] == ["arithmetic", {}]
    told = spec["config"]
    assert told["per_device_train_batch_size"] * told["steps_per_generation"] == 32 * told["num_generations"]
    assert told["bf16"] and told["use_cpu"] == (resolve_device("auto") == "cpu")
    assert short(SHORT.recipe) is SHORT


def test_seconds_to_an_accuracy_and_a_batch() -> None:
    steps: list[dict[str, Any]] = [{"step": step, "wall_s": 10.0 + 2 * step} for step in range(1, 11)]
    found = Outcome("trl", 1, steps, {})
    assert found.s_per_step() == 2.0
    held_out = {0: 0.3, 2: 0.5, 5: 0.75, 10: 0.85}
    assert [found.s_to(target, held_out) for target in (0.45, 0.75, 0.85)] == [14.0, 20.0, 30.0]
    assert found.s_to(0.8, held_out) == pytest.approx(25.0), "half way between those measured"
    assert found.s_to(0.9, held_out) is None


def a_row(
    who: str, num_threads: int, speed: float, reached: float | None, last: float, **others: Any
) -> dict[str, Any]:
    times = {"s_per_batch": speed, "s_to_target": reached, "whole_s": 90.0}
    named = {"workload": "demo", "seed": 0, "who": who, "num_threads": num_threads, "held_out": {"9": 0.1, "12": last}}
    return named | times | others


def test_the_better_number_of_threads_counts() -> None:
    rows = [a_row("headrace", 1, 0.5, 20.0, 0.9), a_row("trl", 1, 1.0, 40.0, 0.9), a_row("trl", 2, 0.8, None, 0.75)]
    assert [ratio.values for ratio in ratios(SHORT, rows)] == [[1.6], [4.5], [pytest.approx(1.2)]]


def test_seeds_that_were_measured_by_the_same_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_: Any, seed: int, settings: str = "now") -> list[dict[str, Any]]:
        speeds = {"headrace": 1.0, "trl": 2.0 + seed}
        return [a_row(who, 1, speed, 1.0, 0.9, seed=seed, settings=settings) for who, speed in speeds.items()]

    monkeypatch.setattr(trl, "measure", measure)
    monkeypatch.setattr("benchmarks.compare.trl_side.make_environment", lambda: None)
    earlier = [*measure(SHORT, 3), *measure(SHORT, 2), *measure(SHORT, 4, "then")]
    told = [part.ratios[0].values for part in compare(SHORT, [0, 2], earlier)]
    assert told == [[2.0, 4.0, 5.0], [2.0, 4.0, 5.0]], "of seeds 0, 2 and 3, in their order"
    assert settings_of(SHORT, recipe(SHORT.recipe)) == settings_of(SHORT, recipe(SHORT.recipe, "seed=7"))
    assert settings_of(SHORT, recipe(SHORT.recipe)) != settings_of(SHORT, recipe(SHORT.recipe, "optimizer.lr=1e-3"))
