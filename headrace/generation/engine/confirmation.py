"""What one engine was last confirmed to hold, and whether it holds what it has been given.

`expect` is asked before the pause; `confirm` then asks the engine for its checksums (`held_weights`). On a CPU, on one
rank, every tensor's bytes are held against the file's. On CUDA, on one rank, those of a sample are, another one for
each version, and `confirm` opens no file. Everywhere each tensor must have changed exactly where the version's digests,
which its manifest has, say so. A first swap is held against the folder that the engine says
it has its weights from; where that is gone nothing is known of what it held, and the log says so.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from blake3 import blake3

from headrace.common.weights.files import MANIFEST_FILE, Manifest
from headrace.generation.engine.http_calls import EngineCalls, EngineError
from headrace.generation.tensors.shapes import StoredTensor, safetensors_entries
from headrace.generation.tensors.verification import (
    Comparison,
    Confirmed,
    Hashes,
    compare_changes,
    other_bytes,
    sample_of,
)

SAMPLE_BYTES = 64 << 20
"""Of the tensors whose bytes are held against the file's at a swap on CUDA: a fraction of a second of one core."""
BY_ITS_LABEL = "the swap is confirmed by the engine's label alone: what it held before is not known"
_log = logging.getLogger(__name__)


class Expected(NamedTuple):
    """What an engine must hold after it has loaded `folder`."""

    folder: Path
    is_exact: bool
    """Each tensor's bytes can be held against the file's."""
    digests: dict[str, str]
    """By the checkpoint's tensors."""
    sample: dict[str, set[str]]
    """By the engine's tensors: the checksums of which each must have one."""


class _Rank(msgspec.Struct):
    checksums: Hashes


class _Checksums(msgspec.Struct):
    ranks: list[_Rank]


class SwapConfirmer:
    """Of one engine. `timeout_s` is the deadline of its hashing."""

    def __init__(self, calls: EngineCalls, timeout_s: float) -> None:
        self.is_hashing = False
        """The engine hashes its tensors, for which it may compile a kernel first, and can be asked for no other sign of
        life."""
        self._calls = calls
        self._timeout_s = timeout_s
        self._confirmed: Confirmed | None = None
        self._told: str | None = None

    async def expect(self, folder: Path, version: int, started_on: Path, device: str, tp_size: int) -> Expected:
        """`started_on` is the folder whose weights the engine says it has."""
        digests = await asyncio.to_thread(_digests, folder)
        if self._confirmed is None:
            begun = await asyncio.to_thread(_comparable, started_on, folder)
            self._confirmed = Confirmed(begun, await self._held())
        sample: dict[str, set[str]] = {}
        if device == "cuda" and tp_size == 1 and len(self._confirmed.held) == 1:
            names = self._confirmed.held[0].keys()
            sample = await asyncio.to_thread(sample_of, folder, names, version, SAMPLE_BYTES)
        return Expected(folder, device == "cpu" and tp_size == 1, digests, sample)

    async def confirm(self, expected: Expected) -> None:
        """Raises `EngineError` saying what is wrong."""
        held = await self._held()
        problem, num_exact = "", len(expected.sample)
        if expected.is_exact:
            problem, num_exact = await asyncio.to_thread(other_bytes, expected.folder, expected.digests.keys(), held[0])
        problem = problem or self._contradiction(expected, held, num_exact)
        if problem:
            raise EngineError(problem)
        self._confirmed = Confirmed(expected.digests, held)

    async def _held(self) -> list[Hashes]:
        """The engine's checksums, by rank."""
        self.is_hashing = True
        try:
            reply = await self._calls.call("/weights_checker", _Checksums, {"action": "checksum"}, self._timeout_s)
        finally:
            self.is_hashing = False
        if not reply.ranks:
            raise EngineError("/weights_checker told of no rank")
        return [rank.checksums for rank in reply.ranks]

    def _contradiction(self, expected: Expected, held: Sequence[Hashes], num_exact: int) -> str:
        assert self._confirmed is not None, "expect comes first"
        wrong = [name for name, may_be in expected.sample.items() if held[0].get(name) not in may_be]
        if wrong:
            num_sampled = len(expected.sample)
            return (
                f"it holds other bytes for {len(wrong)} of {num_sampled} sampled tensors, {wrong[0]} first (it must "
                "run in the dtype of the weights, model.dtype)"
            )
        if [rank.keys() for rank in held] != [rank.keys() for rank in self._confirmed.held]:
            return "" if expected.is_exact else "its tensors or ranks are others than before: start this replica again"
        compared = compare_changes(expected.digests, held, self._confirmed)
        if not compared.contradiction:
            self._tell(compared, len(held[0]), num_exact)
        return compared.contradiction

    def _tell(self, compared: Comparison, num_tensors: int, num_exact: int) -> None:
        """By what a swap is confirmed: once, until it is by something else."""
        told = _described(compared, num_tensors, num_exact)
        if told != self._told:
            _log.log(logging.INFO if told else logging.WARNING, told or BY_ITS_LABEL)
        self._told = told


def _described(compared: Comparison, num_tensors: int, num_exact: int) -> str:
    """Empty if nothing could be compared."""
    if not (compared.num_compared or compared.unknown or num_exact):
        return ""
    told = f"{compared.num_compared} of the engine's {num_tensors} tensors have each changed as the version's have"
    if compared.unknown:
        told += f"; the {len(compared.unknown)} whose names say nothing ({compared.unknown[0]}, …) as a whole"
    return told + (f"; {num_exact} are the file's bit for bit" if num_exact else "")


def _digests(folder: Path) -> dict[str, str]:
    """BLAKE3 of the checkpoint's tensors: the manifest's, where there is one, so that no tensor is read."""
    if (manifest := folder / MANIFEST_FILE).is_file():
        try:
            tensors = msgspec.json.decode(manifest.read_bytes(), type=Manifest).tensors
        except msgspec.MsgspecError as error:
            raise EngineError(f"{manifest} cannot be read: {error}") from error
        return {name: entry.blake3 for name, entry in tensors.items()}
    return _hashed(safetensors_entries(folder))


def _hashed(entries: Iterable[StoredTensor]) -> dict[str, str]:
    return {entry.name: blake3(entry.read()).hexdigest() for entry in entries}


def _comparable(begun: Path, folder: Path) -> dict[str, str]:
    """Digests of the tensors in `begun` that have the same dtype in `folder`; in another equal numbers have other
    bytes. None if `begun` is not here, or is gone while it is read."""
    dtypes = {entry.name: entry.dtype for entry in safetensors_entries(folder)}
    try:
        same = [entry for entry in safetensors_entries(begun) if dtypes.get(entry.name) == entry.dtype]
        if (begun / MANIFEST_FILE).is_file():
            digests = _digests(begun)
            return {entry.name: digests[entry.name] for entry in same if entry.name in digests}
        return _hashed(same)
    except (OSError, ValueError):
        return {}
