"""A real Prometheus that scrapes the real services: every query of the dashboard and every alert finds data."""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio.from_thread
import httpx
import msgspec
import pytest
import redis
import yaml

from headrace.common.config import load_recipe
from headrace.common.http.addresses import free_port, listen, socket_url
from headrace.common.http.service import new_app, serve_in_loop, serve_in_thread
from headrace.common.metrics.endpoint import mount_metrics
from headrace.common.redis.client import connect
from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from headrace.control.assembly import running_app, serving
from headrace.generation.http_api import make_app as make_replica_app
from headrace.learner.reporting.prometheus import LearnerMetrics
from headrace.learner.status import learner_status
from tests.support.fake_sglang import a_fake_sglang, sample
from tests.support.guard import GUARD_S
from tests.support.replay import assemble_loop, end, make_recording
from tests.support.replicas import a_learner, running_replica, until
from tests.support.scraping import tool
from tests.support.seeded_run import RECIPE, heartbeat, seed_run, step_rows

DEPLOY = Path(__file__).parents[2] / "deploy"
SEEDED, LEARNT, SERVED = Keys("seeded"), Keys("learnt"), Keys("served")
"""Runs that control shows, that a learner learns, that a replica serves."""


class Prometheus(NamedTuple):
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, trust_env=False, timeout=GUARD_S)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def values(self, query: str) -> list[float]:
        """Of an instant query's samples."""
        return [float(sample["value"][1]) for sample in self.get("query", query=query)["result"]]


class Late(AssertionError):
    pass


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        if time.monotonic() > deadline:
            raise Late(f"not within {GUARD_S:g} s: {what}")
        time.sleep(0.1)


@contextlib.asynccontextmanager
async def control_at(redis_url: str) -> AsyncIterator[str]:
    sock = listen("127.0.0.1", 0)
    parts = running_app(SEEDED.run, load_recipe(RECIPE, []).config, redis_url, "secret", False)
    async with parts as (app, monitor), serving(app, monitor, sock):
        yield socket_url(sock)


@contextlib.asynccontextmanager
async def replica_at(redis_url: str, demo_policy: Path, engine_url: str) -> AsyncIterator[str]:
    """It has committed a group."""
    sock = listen("127.0.0.1", 0)
    async with (
        running_replica(redis_url, SERVED, engine_url, demo_policy) as replica,
        serve_in_loop(make_replica_app(replica, "secret"), sock),
    ):
        await until(lambda: replica.heartbeat().groups_committed == 1)
        yield socket_url(sock)


@contextlib.contextmanager
def learner_at(client: redis.Redis, folder: Path) -> Iterator[str]:
    """It has learnt a recording."""
    loop = assemble_loop(folder / "run", client, LEARNT, make_recording(folder / "recording.msgpack"))
    app, sock = new_app("learner"), listen("127.0.0.1", 0)
    exported = LearnerMetrics(
        lambda: learner_status(loop, LEARNT.run), loop.reporter.metrics.rows, loop.intake, loop.versions
    )
    mount_metrics(app, exported)
    with serve_in_thread(app, sock):
        assert loop.run()
        yield socket_url(sock)
    end(loop)


@contextlib.contextmanager
def prometheus_of(urls: dict[str, str], folder: Path) -> Iterator[Prometheus]:
    """As deploy/ has it, but for the addresses of what it scrapes and how often."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert jobs == {*urls, "headrace"}
    config["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [url.removeprefix("http://")]}]} for job, url in urls.items()
    ]
    file, address = folder / "prometheus.yml", f"127.0.0.1:{free_port()}"
    file.write_text(yaml.safe_dump(config))
    command = [tool("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    prometheus = Prometheus(f"http://{address}")

    def is_scraping() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        with contextlib.suppress(httpx.HTTPError):
            is_ready = httpx.get(f"{prometheus.url}/-/ready", trust_env=False, timeout=GUARD_S).is_success
            return is_ready and len(prometheus.values("up == 1")) == len(urls)
        return False

    try:
        wait_until(is_scraping, "Prometheus scrapes everybody")
        yield prometheus
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def prometheus(redis_url: str, demo_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder, client = tmp_path_factory.mktemp("prometheus"), connect(redis_url)
    tool("prometheus")
    seed_run(client, SEEDED)
    with contextlib.ExitStack() as stack:
        portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        fake = stack.enter_context(a_fake_sglang())
        fake.replies["/generate"] = (200, [sample(), sample()])
        fake.replies["/status"] = (200, {"counts": {"trained": 640}, "group_stream_length": 9, "unread_groups": 3})
        client.hset(SEEDED.learner, "url", fake.url)  # it answers control as a learner would
        learner = stack.enter_context(a_learner(client, SERVED, folder, demo_policy))
        learner.publish(0)
        learner.issue("0-0")
        replica = portal.wrap_async_context_manager(replica_at(redis_url, demo_policy, fake.url))
        urls = {
            "headrace-control": stack.enter_context(portal.wrap_async_context_manager(control_at(redis_url))),
            "headrace-replica": stack.enter_context(replica),
            "headrace-learner": stack.enter_context(learner_at(client, folder)),
        }
        found = stack.enter_context(prometheus_of(urls, folder))
        go_on(found, client, urls["headrace-control"])
        yield found


def go_on(prometheus: Prometheus, client: redis.Redis, control_url: str) -> None:
    """Two steps more of the seeded run, each seen by Prometheus."""
    for step in (41, 42):
        row = step_rows(step, time.time())[-1] | {"episodes_failed_share": 0.0}
        client.xadd(SEEDED.history, {"kind": "step", "row": msgspec.json.encode(row)})
        client.hset(SEEDED.learner, mapping={"step": step, "weight_version": step + 1})
        for replica in ("generation-0", "generation-1"):
            swap = {"replica": replica, "weight_version": step + 1, "bytes": 20_000, "pause_ms": 50.0, "fetch_ms": 30.0}
            client.xadd(SEEDED.events, {"kind": "weight_swap", "event": msgspec.json.encode(swap)})
            client.set(SEEDED.replica(replica), encode(heartbeat(replica, "http://127.0.0.1:9", step)), ex=3600)
        httpx.get(f"{control_url}/status", trust_env=False, timeout=GUARD_S)
        wait_until(partial(is_seen, prometheus, step), f"step {step} is scraped twice")


def is_seen(prometheus: Prometheus, step: int) -> bool:
    """Twice: with one sample there is no rate."""
    found = prometheus.values(f'count_over_time((headrace_completed_steps{{run="seeded"}} == {step})[1m:2s])')
    return max(found, default=0) >= 2


def expressions() -> list[tuple[str, str]]:
    """Of the dashboard: where it stands, and what it asks, with its variables filled in."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            filled = target["expr"].replace("$__rate_interval", "10m").replace("$run", SEEDED.run)
            found.append((f"{panel['title']}, {target['refId']}", filled.replace("$replica", ".*")))
    return found


def test_every_query_of_the_dashboard_finds_data_by_control_alone(prometheus: Prometheus) -> None:
    assert len(expressions()) > 50
    empty = dict(expressions())

    def are_answered() -> bool:
        """A scrape that timed out on a busy machine leaves a gap, until the next."""
        for place, query in list(empty.items()):
            if any(value == value for value in prometheus.values(query)):
                del empty[place]
        return not empty

    with contextlib.suppress(Late):
        wait_until(are_answered, "every query is answered")
    assert not empty


def test_the_dashboards_variables_find_the_run_and_its_replicas(prometheus: Prometheus) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    asked = {one["name"]: one["definition"] for one in dashboard["templating"]["list"] if one["type"] == "query"}
    found = {}
    for name, definition in asked.items():
        selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", definition).groups()  # type: ignore[union-attr]
        parameters = {"match[]": selector.replace("$run", SEEDED.run)}
        found[name] = set(prometheus.get(f"label/{label}/values", **parameters))
    assert found == {"run": {SEEDED.run, LEARNT.run}, "replica": {"generation-0", "generation-1"}}


def test_every_alert_is_about_series_that_control_has(prometheus: Prometheus) -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    selectors = {
        selector
        for group in groups
        for rule in group["rules"]
        for selector in re.findall(
            r"(?:headrace_\w+|up)(?:\{[^}]*\})?", rule["expr"].replace("run:headrace_active", "")
        )
    }
    assert len(selectors) > 20
    of_control = {
        one: f'{one.removesuffix("}")}{"," if "}" in one else "{"}job="headrace-control"}}' for one in selectors
    }
    ever = {one: f"count_over_time({query}[5m])" for one, query in of_control.items()}
    assert not [one for one, query in ever.items() if not prometheus.values(query)]


def test_prometheus_evaluates_the_rules_and_a_run_that_is_well_raises_none(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()), "the rules are evaluated")
    assert {rule["health"] for rule in rules()} == {"ok"}
    firing = [rule["name"] for rule in rules() if rule.get("state") == "firing"]
    assert firing == []


def test_learner_and_replica_say_the_same_by_the_same_names(prometheus: Prometheus) -> None:
    ours = 'job="headrace-learner"'
    for selector, expected in {
        f'headrace_completed_steps{{run="learnt",{ours}}}': [6],
        f'headrace_groups_total{{state="trained",{ours}}}': [24],
        'headrace_replica_groups_total{run="served",job="headrace-replica"}': [1],
    }.items():
        assert prometheus.values(f"last_over_time({selector}[5m])") == expected

    def names(job: str) -> set[str]:
        return set(prometheus.get("label/__name__/values", **{"match[]": f'{{job="{job}",__name__=~"headrace_.*"}}'}))

    assert names("headrace-control") & names("headrace-learner") > {
        "headrace_completed_steps",
        "headrace_ess",
        "headrace_phase",
    }
    assert names("headrace-control") & names("headrace-replica") > {"headrace_replica_state"}
