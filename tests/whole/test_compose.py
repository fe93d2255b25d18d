"""`docker compose` with a real engine: the stack trains, is scaled, struck in every part, taken down and up again, and
nothing is lost. In this order; most of the time is that of SGLang's starts.
"""

import json
from collections.abc import Iterator

import pytest

from tests.support.compose_stack import SERVICES, Stack, docker, engine_problem

pytestmark = [pytest.mark.compose, pytest.mark.timeout(2400)]
SETTINGS = [
    "learner.steps=100000",
    "learner.groups_per_step=4",
    "learner.checkpoint_interval_steps=5",
    "evaluation.interval_steps=0",
    "evaluation.num_prompts=8",
    "optimizer.lr=1.0e-7",  # so that groups stay mixed, however long it goes on
]


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    """Without one the tests are skipped, which is an error in CI."""
    if problem := engine_problem():
        pytest.skip(f"no Docker engine with Compose here: {problem}")


@pytest.fixture(scope="module")
def stack(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Just built and begun."""
    found = Stack(tmp_path_factory.mktemp("compose"), SETTINGS)
    try:
        found.build()
        found.say("built")
        found.compose("up", "--detach")
        yield found
    finally:
        found.remove()
        found.say("removed")


@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "deploy/compose.gpu.yml"]])
def test_the_files_are_valid(files: list[str]) -> None:
    docker("compose", *(part for file in files for part in ("-f", file)), "config", "--quiet")


def test_everybody_is_healthy_and_takes_ten_steps(stack: Stack) -> None:
    for service in ("redis", *SERVICES):
        stack.wait_for_health(service)
    stack.wait_for("ten steps", stack.step, lambda step: step >= 10)


def test_nobody_can_do_more_than_it_must_nor_tells_the_token(stack: Stack) -> None:
    token = stack.token()
    assert len(token) > 30
    for service in ("redis", *SERVICES):
        container = stack.container(service)
        host, image = container.found["HostConfig"], container.found["Image"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"], service
        assert host["SecurityOpt"] == ["no-new-privileges:true"] and host["Memory"] > 0, service
        assert token not in json.dumps(container.found) + docker("image", "inspect", image), service
        status = stack.compose("exec", "-T", service, "cat", "/proc/1/status")
        assert "\nUid:\t0" not in status and "\nCapEff:\t0000000000000000\n" in status, status
    mode = stack.compose("exec", "-T", "learner", "stat", "--format", "%a", f"/runs/{stack.run}/token")
    assert mode.strip() == "600"


def test_two_replicas_then_one_of_them_cut_from_the_network(stack: Stack) -> None:
    [first] = stack.wait_for_replicas(1)
    stack.compose("up", "--detach", "--scale", "generation=2")
    stack.wait_for_replicas(2)
    cut = next(one for one in stack.containers("generation") if first.startswith(one.id[:12]))
    network = f"{stack.project}_default"
    docker("network", "disconnect", network, cut.id)
    stack.wait_for("the cut replica is missed", stack.replicas, lambda found: first not in found)
    stack.wait_for_steps(5)
    docker("network", "connect", "--alias", "generation", network, cut.id)
    before = stack.wait_for("it is back", stack.replicas, lambda found: first in found)[first]
    stack.wait_for("it works again", stack.replicas, lambda found: found.get(first, 0) > before)
    assert stack.containers("generation")[0].num_restarts == 0, "it outlived the outage"


def test_one_replica_again(stack: Stack) -> None:
    stack.compose("up", "--detach", "--scale", "generation=1")
    stack.wait_for_replicas(1)
    stack.wait_for_steps(3)
    assert "0 violations" in stack.audit()


@pytest.mark.parametrize("service", ["learner", "redis", "control"])
def test_who_is_killed_comes_back_and_the_run_goes_on(stack: Stack, service: str) -> None:
    stack.kill(service)
    stack.wait_for_steps(3)


def test_a_replica_that_is_killed_comes_back(stack: Stack) -> None:
    [before] = stack.wait_for_replicas(1)
    stack.kill("generation")
    stack.wait_for("it works again", stack.replicas, lambda found: before not in found and any(found.values()))
    stack.wait_for_steps(3)


def test_the_run_survives_down_and_up(stack: Stack) -> None:
    before, token = stack.wait_for_steps(1), stack.token()
    stack.compose("down")
    stack.say("down")
    assert not stack.containers("learner")
    stack.compose("up", "--detach")
    stack.wait_for("the run goes on", stack.step, lambda step: step > before + 3)
    assert stack.token() == token


def test_nothing_is_lost_in_the_end(stack: Stack) -> None:
    stack.wait_for("the run is told to stop", lambda: stack.ask("/stop", "POST"), bool)
    ended = stack.wait_for("the learner has ended", lambda: stack.container("learner"), lambda it: not it.is_running)
    assert ended.exit_code == 0, stack.describe()
    audited = stack.audit()
    stack.say(audited)
    assert "dead       0\n" in audited and audited.rstrip().endswith("0 violations"), audited
