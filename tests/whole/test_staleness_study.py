"""The study of staleness: what says most is run first, what has been run is not run again, and no cell is made up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.staleness import report as staleness_report
from benchmarks.staleness.__main__ import best, study
from benchmarks.staleness.forced_staleness import WATCHED, sample
from benchmarks.staleness.forced_staleness import run as forced
from benchmarks.staleness.results import RESULTS, Results
from benchmarks.staleness.runs import GUARDED, GUARDED_LONG, LOSSES, Run
from benchmarks.tasks.long_arithmetic import HIGHEST, LongArithmetic
from headrace.common.config import load_recipe
from headrace.common.tasks.arithmetic import score
from headrace.learner.training import step_metrics

ROOT = Path(__file__).parents[2]


def row(run: Run, *accuracies: float) -> dict[str, Any]:
    columns = {name: [0.5] * 60 for name in ("reward_mean", *WATCHED, "guard_notch")}
    accuracy = dict(zip(("20", "40", "60"), accuracies, strict=True))
    return {"settings": run.settings, "steps": 60, "cpu_s": 1.0, "accuracy": accuracy, "columns": columns}


def test_the_decisive_runs_come_first() -> None:
    runs = list(study(["baseline", "a", "b"], (0, 1, 8, 16), (0, 1)))
    assert [(run.loss, run.staleness) for run in runs[:6]] == [
        (loss, s) for s in (0, 8, 16) for loss in ("baseline", "a")
    ]
    assert len(runs) == len(set(runs)) == 3 * 4 * 2


@pytest.mark.parametrize("loss", [*LOSSES, *GUARDED, *GUARDED_LONG])
def test_every_loss_is_a_valid_recipe(loss: str) -> None:
    config = load_recipe(ROOT / "configs" / "tiny-cpu.yaml", Run(loss, 16, 2).settings).config
    assert (config.learner.max_staleness, config.seed) == (16, 2)
    assert (config.actor.divergence_guard == "act") == loss.endswith("guarded")


def test_what_has_been_run_counts_as_long_as_its_settings_are_the_same(tmp_path: Path) -> None:
    run = Run("default, wide clip", 8, 0)
    Results(tmp_path / "rows.json").add(run, row(run, 0.1, 0.2, 0.3))
    again = Results(tmp_path / "rows.json")
    assert again.of(run) == row(run, 0.1, 0.2, 0.3)
    again.add(run, row(run, 0.1, 0.2, 0.3) | {"settings": ["optimizer.lr=1"]})
    assert again.of(run) is None


def test_a_dip_costs_a_loss_its_rank(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.json")
    for loss, accuracies in {
        "default, wide clip": (0.5, 0.6, 0.7),
        "coupled": (0.1, 0.1, 0.8),
        "baseline": (0.9, 0.9, 0.9),
    }.items():
        results.add(Run(loss, 8, 0), row(Run(loss, 8, 0), *accuracies))
    assert best(results)[:2] == ["default, wide clip", "coupled"]


def test_the_report_shows_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staleness_report, "DOCS", tmp_path)
    page = tmp_path / "staleness.md"
    page.write_text(f"before\n\n{staleness_report.BEGIN}\nold\n{staleness_report.END}\n\nafter\n")
    results = Results(tmp_path / "rows.json")
    for run in (Run("baseline", 8, 0), Run("baseline", 16, 0), Run("baseline", 16, 1)):
        results.add(run, row(run, 0.4, 0.5, 0.6 + run.seed / 10))
    for _ in range(2):
        staleness_report.write_report(results)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| baseline | – | – | – | 0.600 (1) | 0.650 (0.600–0.700; 2) | – |" in text
    assert "Not run: default, wide clip, " in text
    assert (tmp_path / "staleness.svg").exists()


def test_long_chains_are_held_out_answered_and_slipped_on() -> None:
    task = LongArithmetic()
    train = {
        (c.operations, c.operands) for c, _ in zip(LongArithmetic().problems("train", "0 0"), range(500), strict=False)
    }
    held_out = [c for c, _ in zip(LongArithmetic().problems("held_out", ""), range(500), strict=False)]
    assert not train & {(c.operations, c.operands) for c in held_out}
    assert [p.messages for p, _ in zip(task.prompts("held_out", seed=1, epoch=2), range(3), strict=False)] == [
        c.prompt.messages for c in held_out[:3]
    ]
    for chain in held_out:
        answer = chain.prompt.reference["answer"]
        assert score(chain.worked(), answer) == 1.0 and 0 <= int(answer) <= HIGHEST
        assert all(score(slip, answer) == 0.0 for slip in chain.slips)


@pytest.mark.parametrize("drops_ended", [False, True])
def test_log_probabilities_of_what_is_sampled_are_those_of_a_forward_pass(drops_ended: bool) -> None:
    folder = ROOT / "headrace" / "demo" / "policy"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    prompts = [list(range(10, 10 + length)) for length in (3, 7, 5, 12, 9, 4, 8, 6)]
    torch.manual_seed(0)
    found = sample(model, prompts, 40, [end], drops_ended)
    assert len({len(tokens) for tokens, _ in found}) > 3
    for prompt, (tokens, logprobs) in zip(prompts, found, strict=True):
        assert tokens.count(end) == (tokens[-1] == end) and (tokens[-1] == end or len(tokens) == 40)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-4)


def test_groups_are_as_stale_as_is_said_and_the_guard_makes_them_fresher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels of tightening, as if every step raised an alarm: staleness 3, then 1."""
    found: list[int] = []

    def alarming(micro_batches: Any, logprobs: Any) -> dict[str, float]:
        found.append(max(int(m.token_staleness.max()) for m in micro_batches))
        return step_metrics.off_policy_metrics(micro_batches, logprobs) | {"kl_behaviour_proximal": 9.0}

    monkeypatch.setattr("headrace.learner.training.trainer.off_policy_metrics", alarming)
    sizes = ["learner.steps=7", "learner.groups_per_step=6", "actor.group_size=4", "evaluation.num_prompts=4"]
    sizes += ["actor.num_mini_batches=1"]
    settings = [
        *Run("baseline, 4 mini-batches, lr 6e-4, guarded", 3, 0).settings,
        *sizes,
        f"model.path={ROOT}/headrace/demo/policy",
    ]
    config = load_recipe(ROOT / "configs" / "tiny-cpu.yaml", settings).config
    rows = list(forced(config, 4, 7))
    assert found[:3] == [0, 1, 2] and found[3:] == [1] * len(found[3:])
    assert [row["kind"] for row in rows] == ["step"] * 7 + ["evaluation"]


def test_the_settings_of_stored_results_still_exist() -> None:
    """After a renamed setting the study would run again what it has measured."""
    stored = json.loads(RESULTS.read_text())
    assert len(stored) > 100
    for settings in {tuple(row["settings"]) for row in stored.values()}:
        load_recipe(ROOT / "configs" / "tiny-cpu.yaml", settings)
    assert all(Results().of(Run(loss, 8, 0)) for loss in ("baseline", "SAPO", "TIS"))
