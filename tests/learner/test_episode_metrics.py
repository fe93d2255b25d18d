"""Metrics of episodes and of a task's own, by hand; how they reach Prometheus and the history."""

from typing import get_args

import msgspec
import pytest
from msgspec.structs import replace

from headrace.common.metrics.families import Families
from headrace.common.metrics.steps import TEXTS, add_latest_evaluation, add_latest_step, text_of
from headrace.common.metrics.task_metrics import MAX_NAMES, mean_metrics
from headrace.common.wire import FinishReason, Group, Turn, check_group
from headrace.control.polling.history import RunHistory
from headrace.learner.intake.held_out import Evaluation
from headrace.learner.training.episode_metrics import episode_metrics
from tests.support.factories import make_group, make_rollout, make_ticket
from tests.support.segmented import as_episodes


def two_episodes() -> Group:
    """Behind a prompt of three tokens: one of two replies in two segments, the other of one reply."""
    masks = (b"\1\1\0\0\1", b"\1\1\0")
    rollouts = [
        make_rollout(
            float(index),
            (8,) * len(mask),
            loss_mask=mask,
            behaviour_logprobs=make_rollout(tokens=(8,) * mask.count(1)).segments[0].behaviour_logprobs,
            version_spans=make_rollout(tokens=(8,) * mask.count(1), version=index + 1).segments[0].version_spans,
        )
        for index, mask in enumerate(masks)
    ]
    group = as_episodes(replace(make_group(), rollouts=rollouts), [[4], []])
    split, whole = group.rollouts
    turns = [
        Turn("assistant", 0, 0, 2, 10.0, 11.0),
        Turn("tool", 0, 2, 4, 11.0, 15.0),
        Turn("assistant", 1, 0, 1, 15.0, 16.5, cached_tokens=5),
    ]
    first, second = split.segments
    split = replace(
        split,
        segments=[first, replace(second, origin="history")],
        turns=turns,
        failed_episodes=2,
        metrics={"guesses": 2.0, "Right/all": 1.0},
    )
    whole_turns = [Turn("assistant", 0, 0, 2, 3.0, 3.5), Turn("user", 0, 2, 3, 3.5, 3.5)]
    whole = replace(whole, finish_reason="max_turns", turns=whole_turns, metrics={"guesses": 5.0})
    group = replace(group, rollouts=[split, whole])
    check_group(group)
    return group


def test_episode_metrics_by_hand() -> None:
    assert episode_metrics([make_group(), two_episodes()]) == {
        "turns_mean": 1.5,
        "turns_max": 2.0,
        "segments_mean": 1.5,
        "split_share": 0.5,
        "rewritten_share": 0.5,
        "environment_token_share": pytest.approx(3 / 8),
        **{f"finished_{reason}_share": 0.0 for reason in get_args(FinishReason)},
        "finished_stop_share": 0.5,
        "finished_max_turns_share": 0.5,
        "model_s_mean": pytest.approx(1.5),
        "environment_s_mean": pytest.approx(2.0),
        "prefix_cache_share": pytest.approx(5 / (3 + 7 + 3)),
        "episodes_failed_share": 0.5,
    }


def test_a_batch_of_completions_has_none() -> None:
    assert episode_metrics([make_group()]) == {}
    assert mean_metrics([rollout.metrics for rollout in make_group().rollouts], "environment") == {}


def test_a_metric_is_the_mean_over_the_rollouts_that_have_it() -> None:
    measured = [rollout.metrics for rollout in two_episodes().rollouts]
    assert mean_metrics(measured, "environment") == {"environment/Right/all": 1.0, "environment/guesses": 3.5}
    assert len(mean_metrics([{f"n{number}": 1.0} for number in range(3 * MAX_NAMES)], "environment")) == MAX_NAMES


def test_every_metric_of_episodes_has_a_text() -> None:
    assert episode_metrics([two_episodes()]).keys() <= TEXTS.keys()
    assert "latest step or evaluation" not in text_of("environment") + text_of("held_out_metric")


def test_a_tasks_metric_has_its_name_as_a_label_in_prometheus() -> None:
    families = Families(run="r")
    add_latest_step(families, {"environment/Right/all": 0.5, "environment/guesses": 3.5})
    add_latest_evaluation(families, {"held_out": 0.25, "held_out/guesses": 2.0})
    found = {(one.name, one.labels.get("metric")): one.value for family in families for one in family.samples}
    assert found["headrace_environment", "Right/all"] == 0.5 and found["headrace_environment", "guesses"] == 3.5
    assert found["headrace_eval_held_out_metric", "guesses"] == 2.0 and found["headrace_eval_held_out", None] == 0.25


def test_a_tasks_metric_is_in_the_history_of_the_run() -> None:
    history = RunHistory()
    row = {"step": 1, "environment/Right/all": 0.5, "environment/zwölf": 1.0, "other/x": 1.0}
    history.add(("1-0", {b"kind": b"step", b"row": msgspec.json.encode(row)}))
    assert history.row(0) == {"step": 1.0, "environment/Right/all": 0.5}


def test_an_evaluation_has_the_means_of_a_tasks_metrics_and_its_versions() -> None:
    evaluation = Evaluation.of(4, 1, [make_ticket("0-0", kind="eval")])
    evaluation.collect(two_episodes(), {1: 4, 2: 5})
    result = evaluation.result()
    assert (result["held_out/guesses"], result["held_out/Right/all"], result["num_versions"]) == (3.5, 1.0, 2)
    assert (result["num_completions"], result["first_token_step_mean"], result["held_out"]) == (2, 4.5, 0.5)
