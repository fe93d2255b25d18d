"""Swaps an engine's weights while requests are in flight; they continue under the new weights.

A swap always ends with generation continued, and returns only after the engine has confirmed the version: by its label
and by the checksums of its tensors (`confirmation`). The check runs after generation has continued, so it adds no
pause. Completions with tokens of the version wait for it (`wait_until_confirmed`) and are refused if it fails. A
failure after the pause leaves an engine that may hold any weights under its old label (an SGLang that fails half-way
"rolls back" to the new files). Requests in flight are then refused, and so is every later request until a swap has been
confirmed or the engine has been restarted.

Mode `retract` recomputes the KV cache of all requests in flight. `in_place` keeps it. This is exact only in an engine
without the overlap schedule (else one token per request has the wrong version) and without the radix cache (else later
requests get stale KV), and it can deadlock under tensor parallelism: other engines are refused.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from headrace.generation.engine.completions import to_version
from headrace.generation.engine.confirmation import ExpectedWeights, SwapConfirmer
from headrace.generation.engine.http_calls import CONTROL_TIMEOUT_S, EngineCalls, EngineError
from headrace.generation.tensors.shapes import Shapes, expected_shapes, safetensors_shapes

SwapMode = Literal["retract", "in_place"]
CANCELLED_CONTINUE_TIMEOUT_S = 2.0
"""Of a swap that was cancelled: whoever drains has no longer."""


class UnconfirmedWeights(EngineError):
    """The engine says that it sampled with a version that it has not been confirmed to hold."""


@dataclass(frozen=True)
class SwapTimings:
    """Where a swap's time went, as the client saw it."""

    pause_s: float
    """From asking the engine to pause until it had continued: what generation loses."""
    load_s: float
    """The part of `pause_s` in which the engine read and installed the weights."""
    confirm_s: float
    """After the pause: the engine's label and its checksums against the file's."""
    total_s: float


class _UpdateReply(msgspec.Struct):
    success: bool
    message: str


class _ModelInfo(msgspec.Struct):
    model_path: str
    weight_version: str


class _ServerInfo(msgspec.Struct):
    device: str
    tp_size: int
    disable_overlap_schedule: bool
    disable_radix_cache: bool


class WeightSwapper:
    """Of one engine. `timeout_s` is the deadline of the engine's loading of new weights."""

    def __init__(self, calls: EngineCalls, mode: SwapMode, timeout_s: float) -> None:
        self.num_failed_swaps = 0
        """How often a swap failed after the pause."""
        self.has_unverified_weights = False
        """One has, and none was confirmed since: the engine may hold other weights than it says."""
        self._is_loading = False
        self._calls = calls
        self._mode = mode
        self._timeout_s = timeout_s
        self._confirmer = SwapConfirmer(calls, timeout_s)
        self._expected_shapes: Shapes | None = None
        self._unconfirmed: set[int] = set()
        self._swapping = asyncio.Lock()

    @property
    def is_loading(self) -> bool:
        """It reads and installs weights, or hashes what it holds, and can be asked for no other sign of life."""
        return self._is_loading or self._confirmer.is_hashing

    async def swap(self, folder: Path, version: int) -> SwapTimings:
        """Loads the safetensors in `folder` as weight `version`.

        The folder is held against the checkpoint that the engine runs before anything is paused.
        """
        async with self._swapping:
            started_s = time.monotonic()
            started_on = Path((await self._calls.call("/model_info", _ModelInfo)).model_path)
            self._check_folder(folder, started_on)
            server = await self._suitable_server()
            expected = await self._confirmer.expect(folder, version, started_on, server.device, server.tp_size)
            self._unconfirmed.add(version)
            pausing_s = time.monotonic()
            async with self._paused():
                loading_s = time.monotonic()
                await self._load(folder, version)
                loaded_s = time.monotonic()
            continued_s = time.monotonic()
            try:
                await self._confirm(expected, version)
            except BaseException:
                self._mark_failed()
                raise
            self._unconfirmed.discard(version)
            self.has_unverified_weights = False
            ended_s = time.monotonic()
            return SwapTimings(
                pause_s=continued_s - pausing_s,
                load_s=loaded_s - loading_s,
                confirm_s=ended_s - continued_s,
                total_s=ended_s - started_s,
            )

    def mark_restarted(self) -> None:
        """The engine has been started again, on verified weights."""
        self.has_unverified_weights = False

    def _mark_failed(self) -> None:
        self.num_failed_swaps += 1
        self.has_unverified_weights = True

    async def wait_until_confirmed(self, versions: Collection[int], num_failed_before: int) -> None:
        """Waits while one of the versions is being confirmed; raises `UnconfirmedWeights` if that has failed.

        `num_failed_before` is `num_failed_swaps` from when the request began.
        """
        if not self._unconfirmed.isdisjoint(versions):
            async with self._swapping:
                pass
        unconfirmed = sorted(self._unconfirmed.intersection(versions))
        if unconfirmed or self.num_failed_swaps != num_failed_before:
            raise UnconfirmedWeights(f"a swap to {unconfirmed or 'one of its versions'} has not been confirmed")

    async def served_version(self) -> int | None:
        """The version that the engine says it serves; None if it was started without one."""
        label = (await self._calls.call("/model_info", _ModelInfo)).weight_version
        try:
            return None if label == "default" else to_version(label)
        except ValueError as error:
            raise EngineError(f"{self._calls.url}: {error}") from error

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Generation stands still inside; requests in flight lose at most their KV cache. What fails inside, or in
        continuing, refutes what is in flight before anything of it goes on."""
        is_paused = False
        try:
            await self._calls.call("/pause_generation", msgspec.Raw, {"mode": self._mode})
            is_paused = True
            yield
            await self._continue(CONTROL_TIMEOUT_S)
        except BaseException as error:
            if is_paused:
                self._mark_failed()
            is_cancelled = isinstance(error, asyncio.CancelledError)
            with suppress(EngineError):  # which would take the place of the first
                await self._continue(CANCELLED_CONTINUE_TIMEOUT_S if is_cancelled else CONTROL_TIMEOUT_S)
            raise

    async def _load(self, folder: Path, version: int) -> None:
        path = "/update_weights_from_disk"
        # In place the cache cannot be flushed: SGLang would refuse, with the weights changed all the same.
        flush_cache = self._mode == "retract"
        update = {"model_path": str(folder), "weight_version": str(version), "flush_cache": flush_cache}
        self._is_loading = True
        try:
            reply = await self._calls.call(path, _UpdateReply, update, timeout_s=self._timeout_s)
        finally:
            self._is_loading = False
        if not reply.success:
            raise EngineError(f"{path} to version {version}: {reply.message}")

    async def _continue(self, timeout_s: float) -> None:
        await self._calls.call("/continue_generation", msgspec.Raw, {"torch_empty_cache": False}, timeout_s)

    async def _confirm(self, expected: ExpectedWeights, version: int) -> None:
        served = await self.served_version()
        if served != version:
            raise EngineError(f"the engine reports weight version {served} after a swap to {version}")
        try:
            await self._confirmer.confirm(expected)
        except EngineError as error:
            told = f"the engine reports weight version {version} after a swap to {expected.folder}, but"
            raise EngineError(f"{told} {error}") from error

    async def _suitable_server(self) -> _ServerInfo:
        """Raises `EngineError` if swaps in this mode would go wrong in the engine as it was started."""
        server = await self._calls.call("/server_info", _ServerInfo)
        is_suitable = server.disable_overlap_schedule and server.disable_radix_cache and server.tp_size == 1
        if self._mode == "in_place" and not is_suitable:
            raise EngineError(
                "swap_mode in_place needs an engine started with --disable-overlap-schedule, --disable-radix-cache and "
                f"--tp-size 1; {self._calls.url} has overlap schedule {_on(not server.disable_overlap_schedule)}, "
                f"radix cache {_on(not server.disable_radix_cache)}, tp_size {server.tp_size}"
            )
        return server

    def _check_folder(self, folder: Path, started_on: Path) -> None:
        """Raises `EngineError` unless the folder has, whole, every tensor the engine was started with."""
        if self._expected_shapes is None:
            self._expected_shapes = expected_shapes(started_on)
        try:
            shapes = safetensors_shapes(folder)
        except ValueError as error:
            raise EngineError(str(error)) from error
        for name, shape in self._expected_shapes.items():
            if shapes.get(name) != shape:
                found = f"shape {shapes[name]}" if name in shapes else "no such tensor"
                raise EngineError(f"{folder}: {found} for {name}, the engine runs shape {shape}")


def _on(is_on: bool) -> str:
    return "on" if is_on else "off"
