"""Starts the `learner.num_ranks` ranks of a learner on this machine, one process per device. Imports no torch.

This process then stands for the learner. It forwards SIGTERM and SIGINT to rank 0, which takes its checkpoint and ends
the other ranks, and it exits with rank 0's code. It restarts nothing: a rank that is lost ends the others within
`learner.rank_deadline_s`, and then this process ends. No rank outlives it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence

from headrace.common.http.addresses import free_port
from headrace.common.process.child_process import set_parent_death_signal

EXIT_GRACE_S = 10.0
"""How long the other ranks may take to end after rank 0."""
POLL_S = 0.1


def run_ranks(count: int, command: Sequence[str]) -> int:
    """Runs `command` as `count` ranks until rank 0 has ended; returns its exit code, 1 if a signal ended it."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    threads = str(max(1, (os.cpu_count() or 1) // count))
    ranks: list[subprocess.Popen[bytes]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ranks[0].terminate() if ranks else os._exit(0))
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment = {"OMP_NUM_THREADS": threads} | os.environ | address | own
            ranks.append(
                subprocess.Popen(command, env=environment, preexec_fn=set_parent_death_signal(), start_new_session=True)
            )
        code = ranks[0].wait()
        deadline_s = time.monotonic() + EXIT_GRACE_S
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return code if code >= 0 else 1
