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

import msgspec

from headrace.generation.engine.completions import Unconfirmed, to_version
from headrace.generation.engine.http_calls import CONTROL_TIMEOUT_S, EngineCalls, EngineError
from headrace.generation.engine.swaps.checks import ServerInfo, SwapMode, check_folder, check_server
from headrace.generation.engine.swaps.confirmation import ExpectedWeights, SwapConfirmer
from headrace.generation.tensors.shapes import Shapes, expected_shapes

CANCELLED_CONTINUE_TIMEOUT_S = 2.0
"""Deadline of `/continue_generation` after a cancelled swap: a drain has no more time."""


class UnconfirmedWeights(EngineError):
    """The engine reports tokens of a version that it has not been confirmed to hold."""


@dataclass(frozen=True)
class SwapTimings:
    """Durations of a swap's parts in seconds, as measured by the client."""

    pause_s: float
    """From the request to pause until generation has continued: the time that generation loses."""
    load_s: float
    """The part of `pause_s` in which the engine reads and installs the weights."""
    confirm_s: float
    """After the pause: comparing the engine's label and checksums with the file's."""
    total_s: float


class _UpdateReply(msgspec.Struct):
    success: bool
    message: str


class _ModelInfo(msgspec.Struct):
    model_path: str
    weight_version: str


class WeightSwapper:
    """Swaps the weights of one engine. `timeout_s` is the deadline for loading new weights."""

    def __init__(self, calls: EngineCalls, mode: SwapMode, timeout_s: float) -> None:
        self.num_failed_swaps = 0
        """Number of swaps that failed after the pause."""
        self.has_unverified_weights = False
        """True after such a failure until a swap is confirmed: the engine may hold other weights than it reports."""
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
        """Whether the engine reads, installs or hashes weights; it answers no probes meanwhile."""
        return self._is_loading or self._confirmer.is_hashing

    async def swap(self, folder: Path, version: int) -> SwapTimings:
        """Loads the safetensors in `folder` as weight `version`.

        Before the pause, the folder's tensors are compared with those of the checkpoint that the engine runs.
        """
        async with self._swapping:
            started_s = time.monotonic()
            started_on = Path((await self._calls.call("/model_info", _ModelInfo)).model_path)
            if self._expected_shapes is None:
                self._expected_shapes = expected_shapes(started_on)
            check_folder(folder, self._expected_shapes)
            server = await self._calls.call("/server_info", ServerInfo)
            check_server(self._calls.url, server, self._mode)
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
        """To be called after the engine has been restarted on verified weights."""
        self.has_unverified_weights = False

    def _mark_failed(self) -> None:
        self.num_failed_swaps += 1
        self.has_unverified_weights = True

    async def wait_until_confirmed(self, versions: Collection[int], num_failed_before: int) -> None:
        """Waits while one of the versions is being confirmed; raises `UnconfirmedWeights` if the confirmation fails.

        `num_failed_before` is the value of `num_failed_swaps` when the request began.
        """
        if not self._unconfirmed.isdisjoint(versions):
            async with self._swapping:
                pass
        unconfirmed = sorted(self._unconfirmed.intersection(versions))
        if unconfirmed or self.num_failed_swaps != num_failed_before:
            raise UnconfirmedWeights(f"a swap to {unconfirmed or 'one of its versions'} has not been confirmed")

    def unconfirmed(self, versions: Collection[int], num_failed_before: int) -> Unconfirmed | None:
        """Those of the versions that are being confirmed; the arguments are those of `wait_until_confirmed`. Raises
        `UnconfirmedWeights` if a swap has failed."""
        if self.num_failed_swaps != num_failed_before:
            raise UnconfirmedWeights("a swap failed during the request")
        pending = self._unconfirmed.intersection(versions)
        return Unconfirmed(frozenset(pending), num_failed_before) if pending else None

    async def served_version(self) -> int | None:
        """The version that the engine reports; None if it was started without one."""
        label = (await self._calls.call("/model_info", _ModelInfo)).weight_version
        try:
            return None if label == "default" else to_version(label)
        except ValueError as error:
            raise EngineError(f"{self._calls.url}: {error}") from error

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Pauses generation for the block; requests in flight lose at most their KV cache.

        A failure in the block or in continuing marks the swap as failed before any request in flight continues.
        """
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
            with suppress(EngineError):  # it would replace the first error
                await self._continue(CANCELLED_CONTINUE_TIMEOUT_S if is_cancelled else CONTROL_TIMEOUT_S)
            raise

    async def _load(self, folder: Path, version: int) -> None:
        path = "/update_weights_from_disk"
        # In place the cache cannot be flushed: SGLang would refuse the call, but still change the weights.
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
            raise EngineError(
                f"the engine reports weight version {version} after a swap to {expected.folder}, but {error}"
            ) from error
