"""A rank that has nothing to do: rank 0 says nothing but beats for `IDLE_S`, then `End`; the others listen.

WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=1234 python -m tests.support.idle_ranks DEADLINE_S
IDLE_S
"""

import sys
import threading
import time

from headrace.learner.distributed.rank_calls import End, Gather
from headrace.learner.distributed.ranks import RankLost, join


def main() -> int:
    deadline_s, idle_s = map(float, sys.argv[1:])
    ranks = join("cpu", deadline_s)
    lost = threading.Event()
    ranks.on_lost = lost.set
    print("joined", flush=True)
    if ranks.rank == 0:
        is_lost = lost.wait(idle_s)
        if is_lost:
            try:
                with ranks.told(Gather("x")):
                    return 9
            except RankLost:
                print("a rank is lost", flush=True)
        ranks.end(1 if is_lost else 7)  # which tells the others
    started = time.monotonic()
    try:
        call = ranks.hear()
    except RankLost:
        print(f"silence for {time.monotonic() - started:.0f} s", flush=True)
        ranks.end(1)
    assert isinstance(call, End)
    ranks.end(call.code)
    return 9


if __name__ == "__main__":
    sys.exit(main())
