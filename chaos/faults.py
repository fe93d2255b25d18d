"""Does what the schedule says, to whatever process, connection or file is there at that moment.

A target that is being started again is waited for, so that every fault strikes something.
"""

import time
from collections.abc import Callable

import psutil

from chaos.disk import readable_checkpoints, truncate
from chaos.replacement import replace_learner
from chaos.schedule import Fault, Kind
from chaos.targets import engine_process, running_learner, running_replica
from chaos.test_bed import Ground, Strike
from headrace.common.process.waiting import Reason

CHECKPOINTS_TIMEOUT_S = 180.0


def inject(ground: Ground, fault: Fault) -> Strike:
    """Of what is not over at once, `ground` sees to the end."""
    strike = INJECTIONS[fault.kind](ground, fault)
    if strike not in ground.strikes:
        ground.strikes.append(strike)
    strike.tend()
    return strike


def _kill_learner(ground: Ground, fault: Fault) -> Strike:
    return _killed(fault, running_learner(ground), "the learner")


def _freeze_learner(ground: Ground, fault: Fault) -> Strike:
    return _frozen(fault, running_learner(ground), "the learner")


def _kill_replica(ground: Ground, fault: Fault) -> Strike:
    index = fault.choose(ground.launched.num_replicas)
    return _killed(fault, running_replica(ground, index), f"generation-{index}")


def _freeze_replica(ground: Ground, fault: Fault) -> Strike:
    index = fault.choose(ground.launched.num_replicas)
    return _frozen(fault, running_replica(ground, index), f"generation-{index}")


def _kill_engine(ground: Ground, fault: Fault) -> Strike:
    process, name = engine_process(ground, fault)
    return _killed(fault, process, name)


def _freeze_engine(ground: Ground, fault: Fault) -> Strike:
    process, name = engine_process(ground, fault)
    return _frozen(fault, process, name)


def _kill_redis(ground: Ground, fault: Fault) -> Strike:
    """The harness is who starts it again."""
    began_s = time.time()
    ground.redis.kill()
    return Strike(fault, "Redis", began_s, is_over=_after(fault.hold_s), end=ground.redis.restart)


def _freeze_redis(ground: Ground, fault: Fault) -> Strike:
    return _frozen(fault, ground.redis.as_process, "Redis")


def _cut_connections(ground: Ground, fault: Fault) -> Strike:
    began_s = time.time()
    ground.proxy.cut()
    return Strike(fault, "connections to Redis", began_s, _after(fault.hold_s), ground.proxy.pass_on)


def _delay_connections(ground: Ground, fault: Fault) -> Strike:
    ground.proxy.delay(fault.delay_s)
    target = f"connections to Redis, by {fault.delay_s * 1e3:.0f} ms"
    return Strike(fault, target, time.time(), _after(fault.hold_s), ground.proxy.pass_on)


def _stall_connections(ground: Ground, fault: Fault) -> Strike:
    ground.proxy.stall()
    return Strike(fault, "connections to Redis", time.time(), _after(fault.hold_s), ground.proxy.pass_on)


def _fill_disk(ground: Ground, fault: Fault) -> Strike:
    """Until the learner has said that it cannot write, or for `hold_s`."""
    strike = Strike(fault, "the checkpoints' disk", time.time(), end=ground.disk.free, needs_checkpoint=True)
    is_late = _after(fault.hold_s)
    ground.disk.fill()

    def is_over() -> bool:
        if Reason.CHECKPOINT in ground.observer.learner().get("reason", ""):
            strike.note = "the learner said so"
            return True
        ground.disk.fill()
        return is_late()

    strike.is_over = is_over
    return strike


def _truncate_checkpoint(ground: Ground, fault: Fault) -> Strike:
    """With the learner stopped meanwhile, so that the newest stays the newest; there must be one before it."""
    cut: list[str] = []

    def has_cut() -> bool:
        learner = ground.launched.learner()
        if learner is None or len(readable_checkpoints(ground.checkpoints)) < 2:
            return False
        try:
            learner.suspend()
            readable = readable_checkpoints(ground.checkpoints)
            if len(readable) < 2:
                learner.resume()
                return False
            cut.append(truncate(readable[-1], fault.choose(2), fault.place))
            learner.kill()
        except psutil.NoSuchProcess:
            return bool(cut)
        return True

    ground.wait_until(has_cut, CHECKPOINTS_TIMEOUT_S, "two readable checkpoints and a learner")
    return Strike(fault, cut[0], time.time(), needs_checkpoint=True)


INJECTIONS: dict[Kind, Callable[[Ground, Fault], Strike]] = {
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
}


def _killed(fault: Fault, process: psutil.Process, name: str) -> Strike:
    began_s = time.time()
    process.kill()
    return Strike(fault, f"{name} ({process.pid})", began_s)


def _frozen(fault: Fault, process: psutil.Process, name: str) -> Strike:
    began_s = time.time()
    process.suspend()
    return Strike(fault, f"{name} ({process.pid})", began_s, is_over=_after(fault.hold_s), end=process.resume)


def _after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until
