"""A learner that shares its GPU waits until the engine has allocated its memory there. Imports no torch.

An engine sizes its KV cache by the memory that is free while it starts; a learner that allocates meanwhile would make
it smaller. Afterwards each has its own share (headrace/generation/engine/shared_gpu.py), and either can be restarted
beside the other.
"""

import logging
import threading
from contextlib import suppress

import redis

from headrace.common.process.waiting import Reason, Waits
from headrace.common.redis.keys import Keys
from headrace.common.wire import Heartbeat, WireError, decode_heartbeat

POLL_S = 0.25
_log = logging.getLogger(__name__)


def wait_for_engine(client: redis.Redis, keys: Keys, waits: Waits, stop: threading.Event, deadline_s: float) -> None:
    """Waits until a replica's engine serves or `stop` is set; gives up after `deadline_s`, with a warning."""
    while not _is_any_engine_up(client, keys):
        if waits.note(Reason.ENGINE_STARTING, "it takes its share of the GPU first", deadline_s) > deadline_s:
            _log.warning("no engine within %.0f s: the learner takes its share of the GPU without one", deadline_s)
            break
        if stop.wait(POLL_S):
            break
    waits.end(Reason.ENGINE_STARTING)


def _is_any_engine_up(client: redis.Redis, keys: Keys) -> bool:
    for name in client.scan_iter(match=keys.replicas + "*", count=1000):
        with suppress(WireError):
            if _has_engine(decode_heartbeat(client.get(name) or b"")):
                return True
    return False


def _has_engine(replica: Heartbeat) -> bool:
    """Whether the replica's engine is up: while it is not, the heartbeat has a wait for it."""
    return replica.state != "quarantined" and Reason.ENGINE_STARTING not in replica.waits
