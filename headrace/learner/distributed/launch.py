"""The ranks of a learner on this machine, one process a device, as `learner.num_ranks` asks for them; imports no torch.

This process is then the learner for whoever keeps it: what it is told to end, rank 0 is told, which takes its
checkpoint and ends the others; it ends as rank 0 does. Nothing is started again here: a rank that is lost ends the
others within `learner.rank_deadline_s`, and with them this process; and no rank outlives it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence

from headrace.common.http.addresses import free_port
from headrace.common.process.child_process import set_parent_death_signal

LAST_WORDS_S = 10.0
"""After rank 0 the others are given so long to end by themselves."""
POLL_S = 0.1


def run_ranks(count: int, command: Sequence[str]) -> int:
    """`command` as `count` ranks, until rank 0 has ended; its exit code, 1 if a signal ended it."""
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
        deadline_s = time.monotonic() + LAST_WORDS_S
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return code if code >= 0 else 1
