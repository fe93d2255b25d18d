"""Which of the learner's processes this is, and how they speak with each other.

One process is all there is, or torchrun or launch.py has started several. Then rank 0 tells the others what to do
and they hear it, as bytes over a process group of their own on the CPU, beside the one in which they compute.
Guarantees: rank 0 says something at least every `MAX_SILENCE_S`, if only a beat, so that a rank may wait for hours and
still notices within `learner.rank_deadline_s` that rank 0 is gone; a rank whose connection is gone is noticed by the
next thing said.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from headrace.learner.distributed.rank_calls import Call, End, decode_call, encode_call

MAX_SILENCE_S = 5.0
JOIN_POLL_S = 0.05
FINAL = (2, 3, 4)
"""Exit codes after which another start would come to the same end."""
_BEAT = b""
_log = logging.getLogger(__name__)


class RankLost(RuntimeError):
    """Another rank is gone: this process must end, and torchrun starts all of them again."""


class Ranks:
    """This process among `count`. Alone, everything here does nothing."""

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self.local_rank = 0
        """Among those on this machine: the number of its GPU."""
        self.deadline_s = 0.0
        self.on_lost: Callable[[], None] = lambda: None
        """Called on rank 0, from another thread, when a beat finds that a rank is gone."""
        self._group: dist.ProcessGroup | None = None
        self._agent: Store | None = None
        self._lost: Exception | None = None
        self._speaking = threading.Lock()
        self._ended = threading.Event()

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    @contextlib.contextmanager
    def told(self, call: Call) -> Iterator[None]:
        """Within it, the others do what they are told, and rank 0 its part of it. Raises `RankLost`."""
        if self.is_alone:
            yield
            return
        assert self.rank == 0
        with self._speaking:
            self._say(encode_call(call))
            yield

    def hear(self) -> Call:
        """What rank 0 tells this one to do next. Raises `RankLost` once rank 0 is gone, or silent for the deadline."""
        while (content := self._broadcast(None)) == _BEAT:
            pass
        return decode_call(content)

    def hand_out(self, content: bytes) -> bytes:
        """What rank 0 has, on all ranks, in the middle of what it has told them to do. Raises `RankLost`."""
        if self.is_alone:
            return content
        return self._broadcast(content if self.rank == 0 else None)

    def gather(self, content: bytes) -> list[bytes]:
        """What every rank has to say, in the order of ranks: on rank 0; nothing on the others. Raises `RankLost`."""
        if self.is_alone:
            return [content]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with _others_may_be_lost():
            dist.all_gather(sizes, torch.tensor([len(content)]), group=self._group)
            longest = max(1, *(int(size) for size in sizes))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(content)] = _to_tensor(content)
            parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
            dist.gather(padded, parts, dst=0, group=self._group)
        return [part.numpy()[: int(size)].tobytes() for part, size in zip(parts or [], sizes, strict=False)]

    def agree(self, value: bool) -> bool:
        """Rank 0's value, on all ranks at the same time."""
        if self.is_alone:
            return value
        said = torch.tensor([int(value)])
        with _others_may_be_lost():
            dist.broadcast(said, src=0, group=self._group)
        return bool(said)

    def send(self, tensor: Tensor, rank: int) -> None:
        """To one of the others, from host memory."""
        with _others_may_be_lost():
            dist.send(tensor, rank, group=self._group)

    def receive(self, tensor: Tensor) -> Tensor:
        """What rank 0 sends, into `tensor`."""
        with _others_may_be_lost():
            dist.recv(tensor, 0, group=self._group)
        return tensor

    def share(self, tensor: Tensor) -> None:
        """Rank 0's values into it, on all ranks at the same time, on any device."""
        on_host = tensor.cpu().contiguous()
        with _others_may_be_lost():
            dist.broadcast(on_host, src=0, group=self._group)
        tensor.copy_(on_host)

    def total_norm(self, norm: Tensor) -> Tensor:
        """The 2-norm of what all ranks hold together, from that of what this one holds: the same bits on all."""
        if self.is_alone:
            return norm
        own = norm.detach().double()
        norms = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(norms, own)
        return torch.stack(norms).square().sum().sqrt().to(norm.dtype)

    def end(self, code: int) -> None:
        """The others end as well, with the same exit code, as far as they can still be told; alone, nothing happens.

        With others this does not return, nor take anything down: a thread of theirs that lets go of a tensor while the
        interpreter ends aborts the process (`terminate called without an active exception`).
        """
        if self.is_alone or self._ended.is_set():
            return
        self._ended.set()
        if self.rank == 0 and code in FINAL and self._agent is not None:
            self._agent.set("final", str(code))
        if self.rank == 0 and self._lost is None:
            with contextlib.suppress(RankLost), self._speaking:
                self._say(encode_call(End(code)))
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _say(self, content: bytes) -> None:
        if self._lost is not None:
            raise RankLost("another rank is gone") from self._lost
        self._broadcast(content)

    def _broadcast(self, content: bytes | None) -> bytes:
        """`content` on rank 0, None on the others."""
        size = torch.tensor([0 if content is None else len(content)])
        with _others_may_be_lost():
            dist.broadcast(size, src=0, group=self._group)
            buffer = torch.empty(int(size), dtype=torch.uint8) if content is None else _to_tensor(content)
            if len(buffer):
                dist.broadcast(buffer, src=0, group=self._group)
        return buffer.numpy().tobytes() if content is None else content

    def _beat(self) -> None:
        while not self._ended.wait(min(MAX_SILENCE_S, self.deadline_s / 4)):
            try:
                with self._speaking:
                    if not self._ended.is_set():
                        self._say(_BEAT)
            except RankLost as error:
                _log.error("another rank is gone: %s", error)
                self._lost = error
                self.on_lost()
                return


def join(device_type: str, deadline_s: float, environment: Mapping[str, str] = os.environ) -> Ranks:
    """This process among those that torchrun has started; returns when all of them are there.

    torchrun starts again whatever fails: after a final exit code this ends the process at once, with the same code.
    """
    ranks = Ranks()
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return ranks
    ranks.local_rank = int(environment["LOCAL_RANK"])
    if device_type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise ValueError(f"rank {ranks.local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}")
        torch.cuda.set_device(ranks.local_rank)
    ranks.deadline_s = deadline_s
    deadline = timedelta(seconds=deadline_s)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    ranks.rank, ranks.count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store: Store = dist.TCPStore(*address, is_master=False, timeout=deadline)  # type: ignore[attr-defined]
        ranks._agent = PrefixStore("headrace", store)
        if ranks._agent.check(["final"]):
            raise SystemExit(int(ranks._agent.get("final")))
        unused = _unused_part(ranks._agent, ranks, deadline_s)
        dist.init_process_group(backend, store=unused, rank=ranks.rank, world_size=ranks.count, timeout=deadline)
    else:
        dist.init_process_group(backend, timeout=deadline)
    ranks._group = dist.new_group(backend="gloo", timeout=deadline)
    if ranks.rank == 0:
        threading.Thread(target=ranks._beat, name="beat", daemon=True).start()
    return ranks


def _unused_part(store: Store, ranks: Ranks, deadline_s: float) -> Store:
    """Of the agent's store, which outlives the ranks: what those before this start have written must not be found.

    Rank 0 chooses a name and tells it to each rank under an id that only that rank can have written just now.
    """
    if ranks.rank > 0:
        own = uuid.uuid4().hex
        store.set(f"here-{ranks.rank}", own)
        name = store.get(own).decode()
        store.set(f"{name}-{ranks.rank}", "heard")
        return PrefixStore(name, store)
    name, deadline = uuid.uuid4().hex, time.monotonic() + deadline_s
    while missing := [rank for rank in range(1, ranks.count) if not store.check([f"{name}-{rank}"])]:
        for rank in missing:
            if store.check([f"here-{rank}"]):
                store.set(store.get(f"here-{rank}").decode(), name)
        if time.monotonic() > deadline:
            raise RankLost(f"ranks {missing} did not join for {deadline_s:.0f} s")
        time.sleep(JOIN_POLL_S)
    return PrefixStore(name, store)


@contextlib.contextmanager
def _others_may_be_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error).splitlines()[0]) from error


def _to_tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())
