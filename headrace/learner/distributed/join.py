"""Joins this process with the learner's other ranks, as torchrun or launch.py has started them."""

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from headrace.learner.distributed.ranks import FINAL_CODE_KEY, RankLost, Ranks

JOIN_POLL_S = 0.05


def join(device_type: str, deadline_s: float, environment: Mapping[str, str] = os.environ) -> Ranks:
    """This process among those of torchrun's environment variables; returns when all of them are there.

    torchrun restarts ranks after any failure. After a final exit code this ends the process at once with that code.
    """
    rank, count = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks()
    local_rank = int(environment["LOCAL_RANK"])
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"rank {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
    deadline = timedelta(seconds=deadline_s)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    agent_store: Store | None = None
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store: Store = dist.TCPStore(*address, is_master=False, timeout=deadline)  # type: ignore[attr-defined]
        agent_store = PrefixStore("headrace", store)
        if agent_store.check([FINAL_CODE_KEY]):
            raise SystemExit(int(agent_store.get(FINAL_CODE_KEY)))
        unused = _unused_namespace(agent_store, rank, count, deadline_s)
        dist.init_process_group(backend, store=unused, rank=rank, world_size=count, timeout=deadline)
    else:
        dist.init_process_group(backend, timeout=deadline)
    group = dist.new_group(backend="gloo", timeout=deadline)
    return Ranks(rank, count, local_rank, deadline_s, group, agent_store)


def _unused_namespace(store: Store, rank: int, count: int, deadline_s: float) -> Store:
    """A namespace of the agent's store, which outlives the ranks: the keys of earlier starts must not be found.

    Rank 0 chooses a name and sends it to each rank under an id that only that rank can have written just now.
    """
    if rank > 0:
        own = uuid.uuid4().hex
        store.set(f"here-{rank}", own)
        name = store.get(own).decode()
        store.set(f"{name}-{rank}", "heard")
        return PrefixStore(name, store)
    name, deadline = uuid.uuid4().hex, time.monotonic() + deadline_s
    while missing := [other for other in range(1, count) if not store.check([f"{name}-{other}"])]:
        for other in missing:
            if store.check([f"here-{other}"]):
                store.set(store.get(f"here-{other}").decode(), name)
        if time.monotonic() > deadline:
            raise RankLost(f"ranks {missing} did not join for {deadline_s:.0f} s")
        time.sleep(JOIN_POLL_S)
    return PrefixStore(name, store)
