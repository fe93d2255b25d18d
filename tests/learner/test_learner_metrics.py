"""`/metrics`: the format, the names, and that it exports what the learner and the replica know."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from headrace.common.http.service import new_app
from headrace.common.metrics.endpoint import mount_metrics
from headrace.common.metrics.families import Families, Histogram
from headrace.common.metrics.run import GroupTotals
from headrace.common.metrics.steps import TEXTS, StepTotals, add_latest_evaluation, add_latest_step, metric_name
from headrace.common.process.waiting import Reason
from headrace.common.redis.keys import Keys
from headrace.generation.http_api import make_app as make_replica_app
from headrace.learner.loop import Loop
from headrace.learner.reporting.prometheus import LearnerMetrics
from headrace.learner.status import learner_status
from tests.support.fake_sglang import FakeSglang
from tests.support.replay import STEPS, assemble_loop, end
from tests.support.replicas import a_learner, run, running_replica, until
from tests.support.scraping import Scrape, get_metrics, lint, scrape_app


def of(families: Families) -> Scrape:
    app = new_app("test")
    mount_metrics(app, lambda: families)
    return scrape_app(app)


def exported(loop: Loop) -> LearnerMetrics:
    return LearnerMetrics(lambda: learner_status(loop, "r"), loop.reporter.metrics.rows, loop.intake, loop.versions)


def test_a_histogram_counts_by_upper_bound() -> None:
    histogram, families = Histogram([0.1, 1.0]), Families(run="r")
    for value in (0.05, 0.1, 0.5, 30.0):
        histogram.observe(value)
    families.histogram("headrace_x_seconds", "X.", histogram, phase="a")
    scrape = of(families)
    buckets = {
        bound: scrape.value("headrace_x_seconds_bucket", le=bound, phase="a") for bound in ("0.1", "1.0", "+Inf")
    }
    assert buckets == {"0.1": 2, "1.0": 3, "+Inf": 4}
    assert scrape.value("headrace_x_seconds_count", run="r") == 4
    assert scrape.value("headrace_x_seconds_sum") == pytest.approx(30.65)


def test_unknown_values_are_absent_and_states_are_zero_or_one() -> None:
    families = Families(run="r")
    families.gauge("headrace_a", "A.", None)
    families.counter("headrace_b_total", "B.", None)
    families.state_set("headrace_phase", "P.", "phase", ["x", "y"], "z")
    scrape = of(families)
    assert not scrape.values("headrace_a") and not scrape.values("headrace_b_total")
    assert [scrape.value("headrace_phase", phase=phase) for phase in "xyz"] == [0, 0, 1]


def test_a_scraper_that_asks_for_open_metrics_gets_them() -> None:
    families = Families(run="r")
    families.counter("headrace_a_total", "A.", 2)
    families.histogram("headrace_b_seconds", "B.", Histogram([1.0]))
    app = new_app("test")
    mount_metrics(app, lambda: families)

    answer = get_metrics(app, "application/openmetrics-text;version=1.0.0")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    found = {sample.name for family in text_string_to_metric_families(answer.text) for sample in family.samples}
    assert {"headrace_a_total", "headrace_b_seconds_bucket", "process_cpu_seconds_total"} <= found


def test_rows_become_metrics_with_the_unit_at_the_end() -> None:
    families = Families(run="r")
    row = {"kind": "step", "step": 3, "time_s": 9.0, "sampling_s_mean": 2.0, "kl_at_staleness_2": 0.5, "new_thing": 4}
    add_latest_step(families, row | {"batch_tokens": 7.0, "tickets": ["0-0"], "group_durations_s": [1.0], "lr": None})
    add_latest_evaluation(families, {"step": 2, "held_out": 0.75, "pass_at_4": 0.9, "is_best": True})
    scrape = of(families)
    assert scrape.value("headrace_sampling_mean_seconds") == 2.0
    assert scrape.value("headrace_kl_at_staleness", staleness="2") == 0.5
    assert scrape.value("headrace_new_thing") == 4, "a new number of a row is exported"
    assert scrape.value("headrace_batch_tokens") == 7
    assert scrape.value("headrace_latest_step_timestamp_seconds") == 9.0
    assert scrape.value("headrace_eval_held_out") == 0.75 and scrape.value("headrace_eval_step") == 2
    assert scrape.value("headrace_eval_pass_at", k="4") == 0.9
    unwanted = {
        "headrace_completed_steps",
        "headrace_tickets",
        "headrace_lr",
        "headrace_group_duration_seconds",
        "headrace_eval_is_best",
    }
    assert not scrape.names & unwanted


def test_steps_add_up() -> None:
    totals, families = StepTotals(), Families(run="r")
    row = {"batch_tokens": 10.0, "wait_s": 0.2, "train_s": 2.0, "step_s": 2.4, "group_durations_s": [1.0, 3.0]}
    totals.add(row)
    totals.add({"batch_tokens": 5.0, "wait_s": 0.3})
    totals.collect(families)
    scrape = of(families)
    assert scrape.value("headrace_trained_tokens_total") == 15
    assert scrape.value("headrace_step_phase_seconds_sum", phase="wait") == 0.5
    assert scrape.value("headrace_step_phase_seconds_count", phase="train") == 1
    assert scrape.value("headrace_step_duration_seconds_sum") == 2.4
    assert scrape.value("headrace_group_duration_seconds_count") == 2


def test_group_totals_only_grow_even_if_a_resume_goes_back() -> None:
    totals = GroupTotals()
    seen = []
    for trained in (100, 104, 96, 101):
        families = Families(run="r")
        totals.collect(families, {"trained": trained, "generated_tokens": 10 * trained})
        scrape = of(families)
        assert scrape.value("headrace_run_groups", state="trained") == trained
        tokens = scrape.value("headrace_generated_tokens_total")
        seen.append((scrape.value("headrace_groups_total", state="trained"), tokens))
    assert seen == [(0, 0), (4, 40), (4, 40), (9, 90)], "counted from its start; repeated work counts again"


def test_a_learner_exports_its_steps_and_its_status(
    recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    loop = assemble_loop(tmp_path, client, keys, recording)
    app = new_app("test")
    mount_metrics(app, exported(loop))
    try:
        before = scrape_app(app)
        assert loop.run()
        after = scrape_app(app)
    finally:
        end(loop)
    row = loop.progress.latest["step"]
    numbers = {name for name, value in row.items() if isinstance(value, int | float)}
    plain = {name for name in numbers - {"step", "time_s", "weight_version"} if not name.startswith("kl_at_staleness")}
    assert {name: after.value(metric_name(name)) for name in plain} == {name: row[name] for name in plain}
    assert plain <= TEXTS.keys(), f"without a text: {sorted(plain - TEXTS.keys())}"
    assert after.values("headrace_kl_at_staleness")
    assert (before.value("headrace_completed_steps"), after.value("headrace_completed_steps")) == (0, STEPS)
    assert before.value("headrace_phase", phase="starting") == after.value("headrace_phase", phase="finished") == 1
    assert sum(after.values("headrace_phase")) == 1
    assert after.value("headrace_step_phase_seconds_count", phase="wait") == STEPS
    assert after.value("headrace_trained_tokens_total") == sum(
        row["batch_tokens"] for row in loop.reporter.metrics.rows
    )
    assert after.value("headrace_groups_total", state="trained") == 4 * STEPS
    assert after.value("headrace_checkpoint_step") == STEPS and after.value("headrace_checkpoint_bytes") > 1e6
    assert 0 < after.value("headrace_checkpoint_seconds") < 60
    assert client.hget(keys.learner, "checkpoint_step") == str(STEPS).encode()
    assert after.value("headrace_version_bytes", file="delta") > 0
    assert after.value("headrace_advised_replicas") == 1 and not after.values("headrace_desired_replicas")
    assert after.value("headrace_weight_version") == loop.versions.current
    assert after.value("headrace_replicas", state="running") == 0
    assert lint(after) == ""


def test_a_resumed_learner_counts_from_zero(recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    loop = assemble_loop(tmp_path, client, keys, recording)
    loop.run()
    end(loop)
    resumed = assemble_loop(tmp_path, client, keys, recording)
    scrape = of(exported(resumed)())
    end(resumed)
    assert scrape.value("headrace_completed_steps") == STEPS
    assert scrape.value("headrace_run_groups", state="trained") == 4 * STEPS
    assert scrape.value("headrace_groups_total", state="trained") == 0
    assert scrape.value("headrace_trained_tokens_total") == 0
    assert scrape.value("headrace_step_duration_seconds_count") == 0


def test_a_scrape_waits_for_nothing(recording: Path, client: redis.Redis, keys: Keys, tmp_path: Path) -> None:
    loop = assemble_loop(tmp_path, client, keys, recording)
    loop.waits.note(Reason.WAITING_FOR_GROUPS, "nothing")
    collect = exported(loop)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a scrape asked Redis")

    loop.store.client.execute_command = refuse
    try:
        with loop.intake._lock:  # as while the intake works
            started = time.monotonic()
            scrape = of(collect())
            assert time.monotonic() - started < 1.0
    finally:
        del loop.store.client.execute_command
        end(loop)
    assert scrape.value("headrace_current_wait_seconds", who="learner", reason="paused") == 0
    assert scrape.values("headrace_current_wait_seconds", who="learner", reason="waiting_for_groups")


def test_a_replica_exports_its_work(
    tmp_path: Path, client: redis.Redis, redis_url: str, keys: Keys, demo_policy: Path, fake: FakeSglang
) -> None:
    found: list[Scrape] = []

    async def scenario() -> None:
        async with running_replica(redis_url, keys, fake.url, demo_policy) as replica:
            transport = httpx.ASGITransport(app=make_replica_app(replica, "secret"))
            async with httpx.AsyncClient(transport=transport, base_url="http://replica") as http:
                await until(lambda: client.xlen(keys.groups) == 1)
                fake.replies["/generate"] = (400, {"error": "no"})
                learner.issue("0-1")
                await until(lambda: client.xlen(keys.dead_letters) == 1)
                await until(lambda: replica.heartbeat().groups_in_flight == 0)
                found.append(Scrape((await http.get("/metrics")).text))

    with a_learner(client, keys, tmp_path, demo_policy) as learner:
        learner.publish(0)
        learner.issue("0-0")
        run(scenario)
    [scrape] = found
    one = {"run": keys.run, "replica": "a"}
    assert scrape.value("headrace_replica_state", state="running", **one) == 1
    assert sum(scrape.values("headrace_replica_state")) == 1
    assert scrape.value("headrace_replica_weight_version", **one) == 1
    assert scrape.value("headrace_replica_groups_total", **one) == 1
    assert scrape.value("headrace_replica_tokens_total", **one) > 0
    outcomes = ("committed", "failed", "dead", "duplicate")
    found_outcomes = [scrape.value("headrace_replica_tickets_total", outcome=outcome) for outcome in outcomes]
    assert found_outcomes == [1, 1, 1, 0]
    assert scrape.value("headrace_replica_swap_pause_seconds_count", **one) == 1
    assert scrape.value("headrace_replica_swap_phase_seconds_count", phase="load") == 1
    assert scrape.value("headrace_replica_reward_seconds_count", **one) == 1
    assert scrape.value("headrace_replica_fetched_bytes_total", source="folder") > 1e6
    assert scrape.value("headrace_replica_fetched_bytes_total", source="http") == 0
    assert scrape.value("headrace_replica_version_bytes_total") > 1e6
    assert scrape.value("headrace_replica_engine_restarts_total") == 0
    assert not scrape.values("headrace_current_wait_seconds", who="a", reason="waiting_for_weights")
    assert scrape.values("headrace_current_wait_seconds", who="a", reason="no_tickets")
    assert lint(scrape) == ""
