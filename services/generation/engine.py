"""The replica's client of one SGLang server: generate, swap the weights, ask what it serves.

What comes back from `generate` is checked: every token has a finite behaviour log-probability and belongs to one
version span, as the engine itself reported. `swap` lets requests in flight go on under the new weights, always
ends with generation continued, and returns only after the engine has confirmed the version. Every call has a
deadline. Nothing is retried here: a failure is an `EngineError` that names the ticket or the call, and the caller
decides.
"""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from common.wire import Ticket
from services.generation.completions import Completion, Sample, generate_body, to_completion, to_version
from services.generation.tensor_shapes import Shapes, expected_shapes, safetensors_shapes

CONTROL_TIMEOUT_S = 30.0
ABORT_TIMEOUT_S = 1.0
LAST_CONTINUE_TIMEOUT_S = 2.0
"""Of a swap that was cancelled: whoever drains has no longer."""
KEEPALIVE_EXPIRY_S = 2.0
"""Below SGLang's own 5 s, so that a request never goes into a connection that the server is closing."""
SIGNS_OF_LIFE = ("/generate", "/update_weights_from_disk", "/health")
"""What SGLang cannot answer without its scheduler; the other calls its HTTP process answers alone."""


class EngineError(RuntimeError):
    """The engine failed, could not be reached, or answered something that cannot be used."""


@dataclass(frozen=True)
class SwapTimings:
    """Where a swap's time went, as the client saw it."""

    pause_s: float
    """From asking the engine to pause until it had continued: what generation loses."""
    load_s: float
    """The part of `pause_s` in which the engine read and installed the weights."""
    total_s: float


class _Update(msgspec.Struct):
    success: bool
    message: str


class _Model(msgspec.Struct):
    model_path: str
    weight_version: str


Reply = TypeVar("Reply")


class Engine:
    """One SGLang server at `url`. `request_timeout_s` is the deadline of a whole `generate`, `swap_timeout_s` of
    the engine's loading of new weights."""

    def __init__(self, url: str, *, request_timeout_s: float = 600.0, swap_timeout_s: float = 300.0) -> None:
        self.url = url
        self.heard_at = -math.inf
        """`time.monotonic()` of the last sign of life."""
        self._request_timeout_s = request_timeout_s
        self._swap_timeout_s = swap_timeout_s
        self._expected_shapes: Shapes | None = None
        self.is_loading = False
        """It reads and installs weights, and can be asked for no other sign of life."""
        self._swapping = asyncio.Lock()
        limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_EXPIRY_S)
        self._http = httpx.AsyncClient(base_url=url, limits=limits, trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def generate(self, ticket: Ticket) -> list[Completion]:
        """`ticket.num_completions` completions in the engine's order.

        Cancelled or out of time, it aborts the request in the engine before it returns.
        """
        request = uuid.uuid4().hex  # no id may be a prefix of another: SGLang aborts by prefix
        rids = [f"{request}-{index}." for index in range(ticket.num_completions)]
        try:
            async with asyncio.timeout(self._request_timeout_s):
                samples = await self._call("/generate", list[Sample], generate_body(ticket, rids), timeout_s=None)
        except TimeoutError as error:
            await self._abort(rids)
            raise EngineError(f"ticket {ticket.id}: no reply within {self._request_timeout_s:g} s") from error
        except asyncio.CancelledError:
            await self._abort(rids)
            raise
        except EngineError as error:
            raise EngineError(f"ticket {ticket.id}: {error}") from error
        if len(samples) != ticket.num_completions:
            raise EngineError(f"ticket {ticket.id}: {len(samples)} completions, asked for {ticket.num_completions}")
        try:
            return [to_completion(sample) for sample in samples]
        except ValueError as error:
            raise EngineError(f"ticket {ticket.id}: {error}") from error

    async def swap(self, folder: Path, version: int) -> SwapTimings:
        """Loads the safetensors in `folder` as weight `version`; requests in flight go on under them.

        The folder is held against the checkpoint that the engine runs before anything is paused.
        """
        async with self._swapping:
            started_s = time.monotonic()
            await self._check_folder(folder)
            pausing_s = time.monotonic()
            async with self._paused():
                loading_s = time.monotonic()
                await self._load(folder, version)
                loaded_s = time.monotonic()
            continued_s = time.monotonic()
            served = await self.weight_version()
            if served != version:
                raise EngineError(f"the engine reports weight version {served} after a swap to {version}")
            return SwapTimings(continued_s - pausing_s, loaded_s - loading_s, time.monotonic() - started_s)

    async def weight_version(self) -> int | None:
        """The version that the engine says it serves; None if it was started without one."""
        label = (await self._call("/model_info", _Model)).weight_version
        try:
            return None if label == "default" else to_version(label)
        except ValueError as error:
            raise EngineError(f"{self.url}: {error}") from error

    async def health(self, timeout_s: float = CONTROL_TIMEOUT_S) -> bool:
        """Whether the engine answers and its scheduler is alive. Takes a second: SGLang samples a token for it."""
        try:
            await self._send("GET", "/health", None, timeout_s)
        except EngineError:
            return False
        return True

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Generation stands still inside; requests in flight are retracted and lose nothing but their KV cache."""
        try:
            await self._call("/pause_generation", msgspec.Raw, {"mode": "retract"})
            yield
        except BaseException as error:
            is_cancelled = isinstance(error, asyncio.CancelledError)
            with suppress(EngineError):  # which would take the place of the first
                await self._continue(LAST_CONTINUE_TIMEOUT_S if is_cancelled else CONTROL_TIMEOUT_S)
            raise
        await self._continue(CONTROL_TIMEOUT_S)

    async def _load(self, folder: Path, version: int) -> None:
        path = "/update_weights_from_disk"
        update = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
        self.is_loading = True
        try:
            reply = await self._call(path, _Update, update, timeout_s=self._swap_timeout_s)
        finally:
            self.is_loading = False
        if not reply.success:
            raise EngineError(f"{path} to version {version}: {reply.message}")

    async def _continue(self, timeout_s: float) -> None:
        await self._call("/continue_generation", msgspec.Raw, {"torch_empty_cache": False}, timeout_s)

    async def _check_folder(self, folder: Path) -> None:
        """Raises `EngineError` unless the folder has, whole, every tensor the engine was started with."""
        if self._expected_shapes is None:
            self._expected_shapes = expected_shapes(Path((await self._call("/model_info", _Model)).model_path))
        try:
            shapes = safetensors_shapes(folder)
        except ValueError as error:
            raise EngineError(str(error)) from error
        for name, shape in self._expected_shapes.items():
            if shapes.get(name) != shape:
                found = f"shape {shapes[name]}" if name in shapes else "no such tensor"
                raise EngineError(f"{folder}: {found} for {name}, the engine runs shape {shape}")

    async def _abort(self, rids: list[str]) -> None:
        """Ends the requests in the engine; it would notice the closed connection by itself, seconds later."""
        aborts = (self._send("POST", "/abort_request", {"rid": rid}, ABORT_TIMEOUT_S) for rid in rids)
        await asyncio.gather(*aborts, return_exceptions=True)

    async def _call(
        self, path: str, reply_type: type[Reply], body: Any = None, timeout_s: float | None = CONTROL_TIMEOUT_S
    ) -> Reply:
        """POSTs `body`, or GETs without one, and decodes the reply."""
        content = await self._send("GET" if body is None else "POST", path, body, timeout_s)
        try:
            return msgspec.json.decode(content, type=reply_type)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise EngineError(f"{path} answered what cannot be decoded ({error}): {content[:200]!r}") from error

    async def _send(self, method: str, path: str, body: Any, timeout_s: float | None) -> bytes:
        try:
            response = await self._http.request(method, path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise EngineError(f"{path} at {self.url}: {type(error).__name__}: {error}") from error
        if response.status_code != httpx.codes.OK:
            raise EngineError(f"{path} answered {response.status_code}: {response.text[:500]}")
        if path in SIGNS_OF_LIFE:
            self.heard_at = time.monotonic()
        return response.content
