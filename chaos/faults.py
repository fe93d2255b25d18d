"""Injects the scheduled faults into the process, connection or file that exists at that moment.

It waits for a target that is being restarted, so that every fault hits something.
"""

import time
from collections.abc import Callable

import psutil

from chaos.disk import readable_checkpoints, truncate
from chaos.episodes.faults import freeze_environment_worker, kill_agent, kill_environment_worker
from chaos.replacement import replace_learner
from chaos.schedule import Fault, Kind
from chaos.targets import engine_process, running_learner, running_replica
from chaos.test_bed import InjectedFault, TestBed, after
from headrace.common.process.waiting import Reason, decode_waits

CHECKPOINTS_TIMEOUT_S = 180.0


def inject(test_bed: TestBed, fault: Fault) -> InjectedFault:
    """Injects a fault; `test_bed` ends one that lasts."""
    injected_fault = INJECTIONS[fault.kind](test_bed, fault)
    if injected_fault not in test_bed.injected:
        test_bed.injected.append(injected_fault)
    injected_fault.end_if_due()
    return injected_fault


def _kill_learner(test_bed: TestBed, fault: Fault) -> InjectedFault:
    return _killed(fault, running_learner(test_bed), "the learner")


def _freeze_learner(test_bed: TestBed, fault: Fault) -> InjectedFault:
    return _frozen(fault, running_learner(test_bed), "the learner")


def _kill_replica(test_bed: TestBed, fault: Fault) -> InjectedFault:
    index = fault.choose(test_bed.launched.num_replicas)
    return _killed(fault, running_replica(test_bed, index), f"generation-{index}")


def _freeze_replica(test_bed: TestBed, fault: Fault) -> InjectedFault:
    index = fault.choose(test_bed.launched.num_replicas)
    return _frozen(fault, running_replica(test_bed, index), f"generation-{index}")


def _kill_engine(test_bed: TestBed, fault: Fault) -> InjectedFault:
    process, name = engine_process(test_bed, fault)
    return _killed(fault, process, name)


def _freeze_engine(test_bed: TestBed, fault: Fault) -> InjectedFault:
    process, name = engine_process(test_bed, fault)
    return _frozen(fault, process, name)


def _kill_redis(test_bed: TestBed, fault: Fault) -> InjectedFault:
    """The harness restarts it."""
    began_s = time.time()
    test_bed.redis.kill()
    return InjectedFault(fault, "Redis", began_s, is_over=after(fault.hold_s), end=test_bed.redis.restart)


def _freeze_redis(test_bed: TestBed, fault: Fault) -> InjectedFault:
    return _frozen(fault, test_bed.redis.as_process, "Redis")


def _cut_connections(test_bed: TestBed, fault: Fault) -> InjectedFault:
    began_s = time.time()
    test_bed.proxy.cut()
    return InjectedFault(fault, "connections to Redis", began_s, after(fault.hold_s), test_bed.proxy.pass_on)


def _delay_connections(test_bed: TestBed, fault: Fault) -> InjectedFault:
    test_bed.proxy.delay(fault.delay_s)
    target = f"connections to Redis, by {fault.delay_s * 1e3:.0f} ms"
    return InjectedFault(fault, target, time.time(), after(fault.hold_s), test_bed.proxy.pass_on)


def _stall_connections(test_bed: TestBed, fault: Fault) -> InjectedFault:
    test_bed.proxy.stall()
    return InjectedFault(fault, "connections to Redis", time.time(), after(fault.hold_s), test_bed.proxy.pass_on)


def _fill_disk(test_bed: TestBed, fault: Fault) -> InjectedFault:
    """Until the learner reports that it cannot write, or for `hold_s`."""
    injected_fault = InjectedFault(
        fault, "the checkpoints' disk", time.time(), end=test_bed.disk.free, needs_checkpoint=True
    )
    is_late = after(fault.hold_s)
    test_bed.disk.fill()

    def is_over() -> bool:
        if Reason.CHECKPOINT_FAILING in decode_waits(test_bed.observer.learner().get("waits", "")):
            injected_fault.note = "the learner reported it"
            return True
        test_bed.disk.fill()
        return is_late()

    injected_fault.is_over = is_over
    return injected_fault


def _truncate_checkpoint(test_bed: TestBed, fault: Fault) -> InjectedFault:
    """Suspends the learner meanwhile, so that the newest stays the newest; there must be an older one."""
    cut: list[str] = []

    def has_cut() -> bool:
        learner = test_bed.launched.learner()
        if learner is None or len(readable_checkpoints(test_bed.checkpoints)) < 2:
            return False
        try:
            learner.suspend()
            readable = readable_checkpoints(test_bed.checkpoints)
            if len(readable) < 2:
                learner.resume()
                return False
            cut.append(truncate(readable[-1], fault.choose(2), fault.place))
            learner.kill()
        except psutil.NoSuchProcess:
            return bool(cut)
        return True

    test_bed.wait_until(has_cut, CHECKPOINTS_TIMEOUT_S, "two readable checkpoints and a learner")
    return InjectedFault(fault, cut[0], time.time(), needs_checkpoint=True)


INJECTIONS: dict[Kind, Callable[[TestBed, Fault], InjectedFault]] = {
    Kind.KILL_LEARNER: _kill_learner,
    Kind.FREEZE_LEARNER: _freeze_learner,
    Kind.REPLACE_LEARNER: replace_learner,
    Kind.KILL_REPLICA: _kill_replica,
    Kind.FREEZE_REPLICA: _freeze_replica,
    Kind.KILL_ENGINE: _kill_engine,
    Kind.FREEZE_ENGINE: _freeze_engine,
    Kind.KILL_REDIS: _kill_redis,
    Kind.FREEZE_REDIS: _freeze_redis,
    Kind.CUT_CONNECTIONS: _cut_connections,
    Kind.DELAY_CONNECTIONS: _delay_connections,
    Kind.STALL_CONNECTIONS: _stall_connections,
    Kind.FILL_DISK: _fill_disk,
    Kind.TRUNCATE_CHECKPOINT: _truncate_checkpoint,
    Kind.KILL_ENVIRONMENT_WORKER: kill_environment_worker,
    Kind.FREEZE_ENVIRONMENT_WORKER: freeze_environment_worker,
    Kind.KILL_AGENT: kill_agent,
}


def _killed(fault: Fault, process: psutil.Process, name: str) -> InjectedFault:
    began_s = time.time()
    process.kill()
    return InjectedFault(fault, f"{name} ({process.pid})", began_s)


def _frozen(fault: Fault, process: psutil.Process, name: str) -> InjectedFault:
    began_s = time.time()
    process.suspend()
    return InjectedFault(fault, f"{name} ({process.pid})", began_s, is_over=after(fault.hold_s), end=process.resume)
