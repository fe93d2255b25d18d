"""Control's `/metrics` describe the whole run, so a Prometheus needs no other target."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import msgspec
import pytest
import redis
from fastapi import FastAPI

from headrace.common.config import load_recipe
from headrace.common.http.addresses import bearer_header
from headrace.common.metrics.steps import metric_name
from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from headrace.control.assembly import running_app
from headrace.control.view.run_monitor import RunMonitor
from tests.support.guard import GUARD_S
from tests.support.scraping import Scrape, lint
from tests.support.seeded_run import RECIPE, heartbeat, seed_run, step_rows

Scenario = Callable[[FastAPI, RunMonitor, httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def seeded(client: redis.Redis, keys: Keys) -> Keys:
    seed_run(client, keys, num_steps=40, num_replicas=2, num_dead=3)
    return keys


def control(redis_url: str, keys: Keys, scenario: Scenario, require_token_for_reads: bool = False) -> None:
    async def serve() -> None:
        parts = running_app(keys.run, load_recipe(RECIPE, []).config, redis_url, "secret", require_token_for_reads)
        async with asyncio.timeout(GUARD_S), parts as (app, monitor):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://control") as http:
                await scenario(app, monitor, http)

    asyncio.run(serve())


async def scraped(http: httpx.AsyncClient) -> Scrape:
    return Scrape((await http.get("/metrics")).raise_for_status().text)


def test_metrics_have_all_numbers_of_status_and_history(redis_url: str, seeded: Keys) -> None:
    async def scenario(_: FastAPI, monitor: RunMonitor, http: httpx.AsyncClient) -> None:
        await monitor.refresh()  # replicas are known one look after they were found
        scrape, status = await scraped(http), json.loads((await http.get("/status")).text)
        said_elsewhere = ("step", "weight_version", "time_s", "kl_at_staleness_0", "kl_at_staleness_1")
        row = {name: value for name, value in step_rows(40, 0.0)[-1].items() if name not in said_elsewhere}
        assert {name: scrape.value(metric_name(name)) for name in row} == row
        assert scrape.value("headrace_kl_at_staleness", staleness="1") == 0.003
        assert scrape.value("headrace_completed_steps", run=seeded.run) == status["step"] == 40
        assert scrape.value("headrace_target_steps") == status["target_steps"]
        assert scrape.value("headrace_weight_version") == status["weight_version"]
        assert scrape.value("headrace_phase", phase=status["phase"]) == 1
        assert scrape.value("headrace_advised_replicas") == status["replicas"]["advised"] == 3
        assert scrape.value("headrace_dead_letters") == status["queues"]["dead_letters"] == 3
        assert scrape.value("headrace_open_tickets") == 8 and scrape.value("headrace_leased_tickets") == 5
        assert scrape.value("headrace_eval_held_out") == status["latest_evaluation"]["held_out"]
        assert scrape.value("headrace_eval_pass_at", k="2") == status["latest_evaluation"]["pass_at"]["2"]
        assert scrape.value("headrace_checkpoint_step") == 40 and scrape.value("headrace_checkpoint_seconds") == 0.2
        assert scrape.value("headrace_steps_per_hour") == status["rates"]["steps_per_hour"]
        assert scrape.value("headrace_run_groups", state="trained") == status["counts"]["trained"] > 0
        assert scrape.value("headrace_verdict", level=status["verdict"]["level"]) == 1
        for check in status["checks"]:
            values = scrape.values("headrace_check_value", check=check["name"])
            assert values == ([] if check["value"] is None else [check["value"]])
        assert scrape.value("headrace_check_alarm", check="ess") == 0.2
        for index in range(2):
            one = {"replica": f"generation-{index}"}
            assert scrape.value("headrace_replica_state", state="running", **one) == 1
            assert scrape.value("headrace_replica_groups_in_flight", **one) == 4 + index
            assert scrape.value("headrace_replica_tokens_total", **one) == 120_000
            assert scrape.value("headrace_replica_versions_behind", **one) == 0
        assert scrape.value("headrace_replicas", state="running") == 2
        assert lint(scrape) == ""

    control(redis_url, seeded, scenario)


def test_only_what_happens_after_the_start_is_counted(redis_url: str, seeded: Keys, client: redis.Redis) -> None:
    async def scenario(_: FastAPI, monitor: RunMonitor, http: httpx.AsyncClient) -> None:
        before = await scraped(http)
        assert before.value("headrace_step_duration_seconds_count") == 0
        assert before.value("headrace_groups_total", state="dead") == 0
        row = step_rows(41, 0.0)[-1]
        client.xadd(seeded.history, {"kind": "step", "row": msgspec.json.encode(row)})
        swap = {"replica": "generation-0", "weight_version": 42, "bytes": 7, "pause_ms": 50.0, "fetch_ms": "odd"}
        for event in (swap, {"replica": ["odd"]}, {}):
            client.xadd(seeded.events, {"kind": "weight_swap", "event": msgspec.json.encode(event)})
        client.xadd(seeded.dead_letters, {"id": "0-1", "reason": "why"})
        await monitor.refresh()
        after = await scraped(http)
        assert after.value("headrace_trained_tokens_total") == 2000
        assert after.value("headrace_step_phase_seconds_sum", phase="train") == 0.9
        assert after.value("headrace_replica_swap_pause_seconds_sum", replica="generation-0") == 0.05
        assert after.value("headrace_replica_swap_fetch_seconds_count", replica="generation-0") == 0
        assert after.value("headrace_replica_version_bytes_total") == 7
        assert after.value("headrace_groups_total", state="dead") == 1
        assert after.value("headrace_control_polls_total") > before.value("headrace_control_polls_total")
        assert after.value("headrace_control_poll_duration_seconds_count") == after.value(
            "headrace_control_polls_total"
        )

    control(redis_url, seeded, scenario)


def test_waits_are_exported_by_code(redis_url: str, seeded: Keys, client: redis.Redis) -> None:
    waits = {"waiting_for_groups": 120.0, "odd": 1.0}
    client.hset(seeded.learner, mapping={"phase": "waiting", "reason": "any", "waits": msgspec.json.encode(waits)})
    beat = heartbeat("generation-0", "http://127.0.0.1:9", 40)
    ill = msgspec.structs.replace(beat, state="quarantined", reason="refused", waits={"waiting_for_weights": 30.0})
    client.set(seeded.replica("generation-0"), encode(ill), ex=3600)

    async def scenario(_: FastAPI, monitor: RunMonitor, http: httpx.AsyncClient) -> None:
        await monitor.refresh()
        scrape = await scraped(http)
        assert scrape.value("headrace_current_wait_seconds", who="learner", reason="waiting_for_groups") == 120
        assert scrape.value("headrace_current_wait_seconds", who="learner", reason="paused") == 0
        assert scrape.value("headrace_current_wait_seconds", who="generation-0", reason="waiting_for_weights") == 30
        assert scrape.value("headrace_replica_state", replica="generation-0", state="quarantined") == 1
        assert scrape.value("headrace_check_level", check="quarantined") == 2

    control(redis_url, seeded, scenario)


def test_requests_are_counted_by_route(redis_url: str, seeded: Keys) -> None:
    async def scenario(_: FastAPI, __: RunMonitor, http: httpx.AsyncClient) -> None:
        for path in ("/status", "/status", "/groups/0-0", "/groups/nobody", "/nowhere/1", "/nowhere/2"):
            await http.get(path)
        await http.post("/pause")
        scrape = await scraped(http)
        assert scrape.value("headrace_control_requests_total", route="/status", status="200", method="GET") == 2
        assert scrape.value("headrace_control_requests_total", route="/groups/{id}", status="200") == 1
        assert scrape.value("headrace_control_requests_total", route="/groups/{id}", status="404") == 1
        assert scrape.value("headrace_control_requests_total", route="none", status="404") == 2
        assert scrape.value("headrace_control_requests_total", route="/pause", status="401", method="POST") == 1
        assert scrape.value("headrace_control_request_seconds_count", route="/status") == 2

    control(redis_url, seeded, scenario)


def test_there_are_metrics_before_the_run_exists(redis_url: str, keys: Keys) -> None:
    async def scenario(_: FastAPI, monitor: RunMonitor, http: httpx.AsyncClient) -> None:
        monitor.view = None
        scrape = await scraped(http)
        assert not scrape.values("headrace_completed_steps")
        assert scrape.value("headrace_control_latest_poll_timestamp_seconds") > 1e9

    control(redis_url, keys, scenario)


def test_a_scrape_costs_redis_nothing(redis_url: str, seeded: Keys) -> None:
    async def scenario(_: FastAPI, monitor: RunMonitor, http: httpx.AsyncClient) -> None:
        async with monitor._polling:  # nobody looks meanwhile
            before = monitor.poller.num_commands
            assert [(await http.get("/metrics")).status_code for _ in range(20)] == [200] * 20
            assert monitor.poller.num_commands == before

    control(redis_url, seeded, scenario)


def test_metrics_need_the_token_where_reads_do(redis_url: str, seeded: Keys) -> None:
    async def scenario(_: FastAPI, __: RunMonitor, http: httpx.AsyncClient) -> None:
        assert (await http.get("/metrics")).status_code == 401
        assert (await http.get("/metrics", headers=bearer_header("secret"))).status_code == 200

    control(redis_url, seeded, scenario, require_token_for_reads=True)
