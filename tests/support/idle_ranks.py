"""A rank that has nothing to do: rank 0 sends only heartbeats for `IDLE_S`, then `Exit`; the others receive.

WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=1234 python -m tests.support.idle_ranks DEADLINE_S
IDLE_S
"""

import sys
import threading
import time

from headrace.learner.distributed.join import join
from headrace.learner.distributed.rank_calls import Exit, GatherWeight
from headrace.learner.distributed.ranks import RankLost


def main() -> int:
    deadline_s, idle_s = map(float, sys.argv[1:])
    print("imported", flush=True)
    sys.stdin.readline()  # the others have imported, too, which takes longer than they have to join
    ranks = join("cpu", deadline_s)
    lost = threading.Event()
    ranks.on_lost = lost.set
    print("joined", flush=True)
    if ranks.rank == 0:
        is_lost = lost.wait(idle_s)
        if is_lost:
            try:
                with ranks.call_others(GatherWeight("x")):
                    return 9
            except RankLost:
                print("a rank is lost", flush=True)
        ranks.exit_all(1 if is_lost else 7)  # which tells the others
    started = time.monotonic()
    try:
        call = ranks.receive_call()
    except RankLost:
        print(f"silence for {time.monotonic() - started:.0f} s", flush=True)
        ranks.exit_all(1)
    assert isinstance(call, Exit)
    ranks.exit_all(call.code)
    return 9


if __name__ == "__main__":
    sys.exit(main())
