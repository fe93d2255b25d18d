"""A run whose Redis master dies, under Sentinels that promote a replica which lacks what was acknowledged last."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from headrace.common.process.run_token import TOKEN_VARIABLE
from headrace.common.redis.address import MasterChanged
from headrace.common.redis.client import OUTAGE_DEADLINE_S, connect
from headrace.common.redis.keys import Keys
from headrace.launcher.run.processes import REDIS_URL_VARIABLE, Service
from headrace.learner.commands.audit import audit
from tests.learner.test_learner_faults import after_step
from tests.support.guard import GUARD_S
from tests.support.launched_run import rows_of
from tests.support.redis_servers import Watched, servers, until
from tests.support.replay import ROOT, assemble_loop, end, make_recording, state_of, trained

EXIT_TIMEOUT_S = 1200.0


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with servers(tmp_path) as start:
        yield Watched(start, tmp_path)


def test_a_learner_stops_at_another_master_and_the_next_start_repairs_what_it_lacks(
    watched: Watched, redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    """Two steps with a checkpoint between them are lost in Redis: what comes of it is the same, bit for bit, as by a
    learner that nothing happened to."""
    recording = make_recording(tmp_path / "recording.msgpack")
    undisturbed = assemble_loop(tmp_path / "undisturbed", connect(redis_url), keys, recording)
    assert undisturbed.run()
    end(undisturbed)
    client = connect(watched.url, deadline_s=OUTAGE_DEADLINE_S, is_one_master=True)
    loop = assemble_loop(tmp_path / "run", client, keys, recording)
    after_step(loop, 3, watched.replicate_no_more)
    after_step(loop, 5, watched.fall)
    with pytest.raises(MasterChanged, match="what was written last may be lost"):
        loop.run()
    end(loop)
    with connect(watched.url) as promoted:
        assert int(promoted.hget(keys.learner, "step") or 0) < 4, "what the checkpoint of step 4 knows is lost in Redis"
    again = assemble_loop(tmp_path / "run", connect(watched.url, is_one_master=True), keys, recording)
    assert again.progress.step == 4 and again.run()
    end(again)
    assert trained(tmp_path / "run") == trained(tmp_path / "undisturbed")
    assert state_of(tmp_path / "run") == state_of(tmp_path / "undisturbed")
    with connect(watched.url) as promoted:
        assert audit(promoted, keys, tmp_path / "run").violations == []


@pytest.mark.slow
def test_a_whole_run_goes_on_after_a_failover_that_lost_what_was_acknowledged(watched: Watched, tmp_path: Path) -> None:
    """The learner's program and two replicas with simulated engines, all at work while the master falls."""
    environment = {REDIS_URL_VARIABLE: watched.url, TOKEN_VARIABLE: "secret"}
    settings = ["learner.steps=100000", "learner.checkpoint_interval_steps=3", "evaluation.num_prompts=4"]
    chosen = [
        part for setting in [*settings, "generation.engine.url=http://127.0.0.1:1"] for part in ("--set", setting)
    ]
    place = ["--config", str(ROOT / "configs" / "tiny-cpu.yaml"), "--run", "run", "--runs-folder", str(tmp_path)]
    learner_command = [sys.executable, "-m", "benchmarks.scale.simulated_learner", "0.1", "0.1", *place, *chosen]
    replica_command = [sys.executable, "-m", "benchmarks.scale.simulated_replicas", "0.1", "one", "two"]

    def steps() -> int:
        metrics = tmp_path / "run" / "metrics.jsonl"
        return len(rows_of(tmp_path / "run", "step")) if metrics.exists() else 0

    services = [Service("learner", learner_command, tmp_path / "learner.log", environment)]
    learner = services[0]
    services.append(Service("replicas", replica_command, tmp_path / "replicas.log", environment))
    try:
        until(lambda: steps() >= 7)
        watched.replicate_no_more()
        num_replicated = steps()
        until(lambda: steps() >= num_replicated + 4)
        watched.fall()
        assert learner.process.wait(EXIT_TIMEOUT_S) == 1
        assert "what was written last may be lost" in learner.log_tail()
        services[0] = learner = Service("learner", learner_command, tmp_path / "learner.log", environment)
        until(lambda: steps() >= num_replicated + 20)
        learner.ask_to_stop()
        assert learner.process.wait(EXIT_TIMEOUT_S) == 0
    finally:
        for service in services:
            service.stop(GUARD_S)
    with redis.Redis(port=watched.replica) as client:
        found = audit(client, Keys("run"), tmp_path / "run")
    assert found.violations == [] and found.counts["trained"] > 0
