"""Communication between the learner's ranks: calls from rank 0 to the others, and collective operations.

A learner is one process, or several that join.py has joined. Rank 0 then sends calls to the others, as bytes over a
separate process group on the CPU, beside the group in which they compute.
Guarantees: rank 0 sends a call or a heartbeat at least every `MAX_SILENCE_S`, so that a rank may wait for hours and
still notices within `learner.rank_deadline_s` that rank 0 is gone. The next call or heartbeat notices a rank whose
connection is gone.
"""

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from headrace.learner.distributed.rank_calls import Call, Exit, decode_call, encode_call

MAX_SILENCE_S = 5.0
FINAL_EXIT_CODES = (2, 3, 4)
"""Exit codes after which a restart would end the same way."""
FINAL_CODE_KEY = "final"
"""The key of the agent's store that holds a final exit code."""
_HEARTBEAT = b""
_log = logging.getLogger(__name__)


class RankLost(RuntimeError):
    """Another rank is gone: this process must end, and torchrun restarts all of them."""


class Ranks:
    """This process as one of `count` ranks. With a single rank, every method returns at once."""

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        local_rank: int = 0,
        deadline_s: float = 0.0,
        group: dist.ProcessGroup | None = None,
        agent_store: Store | None = None,
    ) -> None:
        """`local_rank`: the rank among those of this machine, which is the number of its GPU. `group`: the ranks'
        group on the CPU. `agent_store`: torchrun's, where it has one. Rank 0 begins to send heartbeats."""
        self.rank, self.count, self.local_rank, self.deadline_s = rank, count, local_rank, deadline_s
        self.on_lost: Callable[[], None] = lambda: None
        """Called on rank 0, in another thread, when a heartbeat finds that a rank is gone."""
        self._group = group
        self._agent_store = agent_store
        self._lost: Exception | None = None
        self._sending = threading.Lock()
        self._ended = threading.Event()
        if rank == 0 and count > 1:
            threading.Thread(target=self._send_heartbeats, name="heartbeats", daemon=True).start()

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    @contextlib.contextmanager
    def call_others(self, call: Call) -> Iterator[None]:
        """Sends `call` to the other ranks, which execute it while rank 0 executes the block. Raises `RankLost`."""
        if self.is_alone:
            yield
            return
        assert self.rank == 0
        with self._sending:
            self._send(encode_call(call))
            yield

    def receive_call(self) -> Call:
        """The next call of rank 0. Raises `RankLost` once rank 0 is gone, or silent for the deadline."""
        while (content := self._broadcast(None)) == _HEARTBEAT:
            pass
        return decode_call(content)

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Rank 0's `content`, on all ranks, within a call. Raises `RankLost`."""
        if self.is_alone:
            return content
        return self._broadcast(content if self.rank == 0 else None)

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """On rank 0 every rank's `content`, in the order of ranks; empty on the others. Raises `RankLost`."""
        if self.is_alone:
            return [content]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with _raises_rank_lost():
            dist.all_gather(sizes, torch.tensor([len(content)]), group=self._group)
            longest = max(1, *(int(size) for size in sizes))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(content)] = _to_tensor(content)
            parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
            dist.gather(padded, parts, dst=0, group=self._group)
        return [part.numpy()[: int(size)].tobytes() for part, size in zip(parts or [], sizes, strict=False)]

    def broadcast_flag(self, value: bool) -> bool:
        """Rank 0's `value`, on all ranks. Raises `RankLost`."""
        if self.is_alone:
            return value
        flag = torch.tensor([int(value)])
        with _raises_rank_lost():
            dist.broadcast(flag, src=0, group=self._group)
        return bool(flag)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Sends a tensor in host memory to another rank. Raises `RankLost`."""
        with _raises_rank_lost():
            dist.send(tensor, rank, group=self._group)

    def receive(self, tensor: Tensor) -> Tensor:
        """Receives into `tensor` what rank 0 sends. Raises `RankLost`."""
        with _raises_rank_lost():
            dist.recv(tensor, 0, group=self._group)
        return tensor

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Copies rank 0's values into every rank's `tensor`, on any device. Raises `RankLost`."""
        on_host = tensor.cpu().contiguous()
        with _raises_rank_lost():
            dist.broadcast(on_host, src=0, group=self._group)
        tensor.copy_(on_host)

    def total_norm(self, norm: Tensor) -> Tensor:
        """The 2-norm over all ranks from each rank's own 2-norm: the same bits on all ranks."""
        if self.is_alone:
            return norm
        own = norm.detach().double()
        norms = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(norms, own)
        return torch.stack(norms).square().sum().sqrt().to(norm.dtype)

    def exit_all(self, code: int) -> None:
        """Ends all ranks that can still be reached with the same exit code; with a single rank it does nothing.

        With others this does not return. It skips the interpreter's shutdown: a thread that frees a tensor meanwhile
        would abort the process (`terminate called without an active exception`).
        """
        if self.is_alone or self._ended.is_set():
            return
        self._ended.set()
        if self.rank == 0 and code in FINAL_EXIT_CODES and self._agent_store is not None:
            self._agent_store.set(FINAL_CODE_KEY, str(code))
        if self.rank == 0 and self._lost is None:
            with contextlib.suppress(RankLost), self._sending:
                self._send(encode_call(Exit(code)))
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _send(self, content: bytes) -> None:
        if self._lost is not None:
            raise RankLost("another rank is gone") from self._lost
        self._broadcast(content)

    def _broadcast(self, content: bytes | None) -> bytes:
        """`content` is None on all ranks but rank 0."""
        size = torch.tensor([0 if content is None else len(content)])
        with _raises_rank_lost():
            dist.broadcast(size, src=0, group=self._group)
            buffer = torch.empty(int(size), dtype=torch.uint8) if content is None else _to_tensor(content)
            if len(buffer):
                dist.broadcast(buffer, src=0, group=self._group)
        return buffer.numpy().tobytes() if content is None else content

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(min(MAX_SILENCE_S, self.deadline_s / 4)):
            try:
                with self._sending:
                    if not self._ended.is_set():
                        self._send(_HEARTBEAT)
            except RankLost as error:
                _log.error("another rank is gone: %s", error)
                self._lost = error
                self.on_lost()
                return


@contextlib.contextmanager
def _raises_rank_lost() -> Iterator[None]:
    """Turns a failed collective operation into `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error).splitlines()[0]) from error


def _to_tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())
