"""Faults in the middle of an episode: its worker is killed or frozen, or the agent that it has started is killed.

An agent that has had a reply is in the middle of its episode. Its worker is suspended first, so that the episode cannot
end before it is hit.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from chaos.episodes.agent import NAME
from chaos.episodes.guessing_with_agents import AGENT
from chaos.launched import Launched, children_of, is_alive, words_of
from chaos.schedule import Fault
from chaos.targets import TARGET_TIMEOUT_S
from chaos.test_bed import InjectedFault, TestBed, after

GONE_S = 30.0
"""In which a dead worker's agents must be gone; its replica may be frozen for 20 of them."""


class _Playing(NamedTuple):
    agent: psutil.Process
    worker: psutil.Process
    name: str


def kill_agent(test_bed: TestBed, fault: Fault) -> InjectedFault:
    playing, began_s = _suspended(test_bed, fault), time.time()
    playing.agent.kill()
    playing.worker.resume()
    return InjectedFault(fault, f"{playing.name}'s agent ({playing.agent.pid})", began_s)


def kill_environment_worker(test_bed: TestBed, fault: Fault) -> InjectedFault:
    playing, began_s = _suspended(test_bed, fault), time.time()
    playing.worker.kill()
    injected_fault = InjectedFault(fault, f"{playing.name} ({playing.worker.pid})", began_s)
    agent = playing.agent
    test_bed.wait_until(lambda: not is_alive(agent), GONE_S, f"the end of agent {agent.pid}, whose worker is dead")
    return injected_fault


def freeze_environment_worker(test_bed: TestBed, fault: Fault) -> InjectedFault:
    playing, began_s = _suspended(test_bed, fault), time.time()
    name = f"{playing.name} ({playing.worker.pid})"
    return InjectedFault(fault, name, began_s, after(fault.hold_s), playing.worker.resume)


def _suspended(test_bed: TestBed, fault: Fault) -> _Playing:
    """An agent in the middle of its episode, whose worker has been suspended."""
    suspended: list[_Playing] = []

    def suspend_one() -> bool:
        found = list(_playing(test_bed.launched))
        if found:
            chosen = found[fault.choose(len(found))]
            try:
                chosen.worker.suspend()
            except psutil.NoSuchProcess:
                return False
            if _is_in_episode(chosen.agent):
                suspended.append(chosen)
            else:
                chosen.worker.resume()
        return bool(suspended)

    test_bed.wait_until(suspend_one, TARGET_TIMEOUT_S, "an agent in the middle of its episode")
    return suspended[0]


def _playing(launched: Launched) -> Iterator[_Playing]:
    for index in range(launched.num_replicas):
        for worker in launched.environment_workers(index):
            for agent in children_of(worker):
                if str(AGENT) in words_of(agent) and _is_in_episode(agent):
                    yield _Playing(agent, worker, f"an environment worker of generation-{index}")


def _is_in_episode(agent: psutil.Process) -> bool:
    """It has had a reply, and has not ended."""
    try:
        return Path(f"/proc/{agent.pid}/comm").read_text().startswith(NAME) and is_alive(agent)
    except OSError:
        return False
