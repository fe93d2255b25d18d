"""The replica's client of one SGLang server: generate, swap the weights, ask what it serves.

What comes back from `generate` is checked: every token has a finite behaviour log-probability and belongs to one
version span, as the engine itself reported. `swap` lets requests in flight go on under the new weights, always
ends with generation continued, and returns only after the engine has confirmed the version. Nothing is retried
here: a failure is an `EngineError` that names the ticket or the call, and the caller decides.
"""

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import httpx
import msgspec
import numpy as np

from common.wire import Ticket, VersionSpan

CONTROL_TIMEOUT_S = 30.0
ABORT_TIMEOUT_S = 5.0
KEEPALIVE_EXPIRY_S = 2.0
"""Below SGLang's own 5 s, so that a request never goes into a connection that the server is closing."""

FinishReason = Literal["stop", "length"]
Shapes = dict[str, tuple[int, ...]]


class EngineError(RuntimeError):
    """The engine failed, could not be reached, or answered something that cannot be used."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a ticket's prompt; the stop token, if any, is its last token."""

    tokens: list[int]
    behaviour_logprobs: np.ndarray
    """float32 `(len(tokens),)`, at the sampling temperature."""
    version_spans: list[VersionSpan]
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True)
class SwapTimings:
    """Where a swap's time went, as the client saw it."""

    pause_s: float
    """From asking the engine to pause until it had continued: what generation loses."""
    load_s: float
    """The part of `pause_s` in which the engine read and installed the weights."""
    total_s: float


class _Finish(msgspec.Struct):
    type: str
    message: str | None = None


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Meta(msgspec.Struct):
    finish_reason: _Finish
    output_token_logprobs: list[tuple[float | None, int, str | None]]
    weight_versions: list[_Span] = []


class _Sample(msgspec.Struct):
    """One entry of the reply of `/generate`; a number that is not finite arrives as null."""

    text: str
    output_ids: list[int]
    meta_info: _Meta


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
        self._request_timeout_s = request_timeout_s
        self._swap_timeout_s = swap_timeout_s
        self._expected_shapes: Shapes | None = None
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
                samples = await self._call("/generate", list[_Sample], _generate_body(ticket, rids), timeout_s=None)
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
            return [_completion(sample) for sample in samples]
        except ValueError as error:
            raise EngineError(f"ticket {ticket.id}: {error}") from error

    async def swap(self, folder: Path, version: int) -> SwapTimings:
        """Loads the safetensors in `folder` as weight `version`; requests in flight go on under them.

        The folder is held against the checkpoint that the engine runs before anything is paused, because SGLang
        dies of a truncated file or a wrong shape and silently keeps the present weights of a missing tensor.
        """
        async with self._swapping:
            started_s = time.monotonic()
            await self._check_folder(folder)
            update = {"model_path": str(folder), "weight_version": str(version), "flush_cache": True}
            pausing_s = time.monotonic()
            async with self._paused():
                loading_s = time.monotonic()
                path = "/update_weights_from_disk"
                reply = await self._call(path, _Update, update, timeout_s=self._swap_timeout_s)
                if not reply.success:
                    raise EngineError(f"{path} to version {version}: {reply.message}")
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
            return None if label == "default" else _version(label)
        except ValueError as error:
            raise EngineError(f"{self.url}: {error}") from error

    async def health(self) -> bool:
        """Whether the engine answers and its scheduler is alive. Takes a second: SGLang samples a token for it."""
        try:
            return (await self._http.get("/health", timeout=CONTROL_TIMEOUT_S)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Generation stands still inside; requests in flight are retracted and lose nothing but their KV cache."""
        try:
            await self._call("/pause_generation", msgspec.Raw, {"mode": "retract"})
            yield
        finally:
            await self._call("/continue_generation", msgspec.Raw, {"torch_empty_cache": False})

    async def _check_folder(self, folder: Path) -> None:
        """Raises `EngineError` unless the folder has, whole, every tensor the engine was started with."""
        if self._expected_shapes is None:
            self._expected_shapes = _expected_shapes(Path((await self._call("/model_info", _Model)).model_path))
        shapes = _safetensors_shapes(folder)
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
        return response.content


def _generate_body(ticket: Ticket, rids: list[str]) -> dict[str, Any]:
    """The prompt once per completion rather than `n`: with `n` SGLang replaces our ids, and it is slower."""
    return {
        "input_ids": [ticket.prompt_tokens] * len(rids),
        "rid": rids,
        "sampling_params": {
            "temperature": ticket.sampling.temperature,
            "max_new_tokens": ticket.sampling.max_new_tokens,
            "stop_token_ids": ticket.sampling.stop_token_ids,
            "top_p": 1.0,
            "top_k": -1,
        },
        "return_logprob": True,
    }


def _completion(sample: _Sample) -> Completion:
    """Raises `ValueError` saying what is wrong with the sample."""
    problem = _sample_problem(sample)
    if problem:
        raise ValueError(problem)
    meta = sample.meta_info
    return Completion(
        tokens=sample.output_ids,
        behaviour_logprobs=np.array([logprob for logprob, _, _ in meta.output_token_logprobs], dtype=np.float32),
        version_spans=[VersionSpan(_version(span.version), span.start, span.end) for span in meta.weight_versions],
        finish_reason=cast(FinishReason, meta.finish_reason.type),
        text=sample.text,
    )


def _sample_problem(sample: _Sample) -> str:
    meta, num_tokens = sample.meta_info, len(sample.output_ids)
    if meta.finish_reason.type not in get_args(FinishReason):
        return f"finished with {meta.finish_reason.type}: {meta.finish_reason.message}"
    if num_tokens == 0:
        return "no tokens"
    if [token for _, token, _ in meta.output_token_logprobs] != sample.output_ids:
        return f"{len(meta.output_token_logprobs)} log-probabilities that are not those of the {num_tokens} tokens"
    if not all(logprob is not None and math.isfinite(logprob) for logprob, _, _ in meta.output_token_logprobs):
        return "a log-probability is not finite"
    edges = [0, *(span.end for span in meta.weight_versions)]
    starts = [span.start for span in meta.weight_versions]
    if starts != edges[:-1] or edges[-1] != num_tokens or sorted(set(edges)) != edges:
        spans = [(span.version, span.start, span.end) for span in meta.weight_versions]
        return f"weight_versions {spans} do not tile {num_tokens} tokens"
    return ""


def _version(label: str) -> int:
    """SGLang's versions are free text; ours are numbers."""
    if not label.isdecimal():
        raise ValueError(f"weight version {label!r} is not a number")
    return int(label)


def _expected_shapes(model: Path) -> Shapes:
    """What a swap must bring: the tensors of the checkpoint in `model`; none if it is not a folder here."""
    shapes = _safetensors_shapes(model) if model.is_dir() else {}
    config = model / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)  # some checkpoints store the tied head a second time
    return shapes


def _safetensors_shapes(folder: Path) -> Shapes:
    """Names and shapes of all tensors in the folder, from the files' headers; raises `EngineError` on a torn file."""
    shapes: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                size_bytes = path.stat().st_size - 8 - header_bytes
                tensors = json.loads(file.read(header_bytes)) if size_bytes >= 0 else {}
            tensors.pop("__metadata__", None)
            if size_bytes != max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0):
                raise ValueError(f"{path.stat().st_size} bytes are not the length its header tells")
            shapes |= {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{path} is not a whole safetensors file: {error}") from error
    return shapes
