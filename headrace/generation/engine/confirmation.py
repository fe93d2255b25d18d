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
    Checksums,
    Comparison,
    ConfirmedState,
    compare_bytes,
    compare_changes,
    sample_checksums,
)

SAMPLE_BYTES = 64 << 20
"""Of the tensors whose bytes are held against the file's at a swap on CUDA: a fraction of a second of one core."""
LABEL_ONLY = "the swap is confirmed by the engine's label alone: what it held before is not known"
_log = logging.getLogger(__name__)


class ExpectedWeights(NamedTuple):
    """What an engine must hold after it has loaded `folder`."""

    folder: Path
    is_byte_exact: bool
    """Each tensor's bytes can be held against the file's."""
    digests: dict[str, str]
    """By the checkpoint's tensors."""
    sample: dict[str, set[str]]
    """By the engine's tensors: the checksums of which each must have one."""


class _Rank(msgspec.Struct):
    checksums: Checksums


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
        self._confirmed: ConfirmedState | None = None
        self._last_evidence: str | None = None

    async def expect(self, folder: Path, version: int, started_on: Path, device: str, tp_size: int) -> ExpectedWeights:
        """`started_on` is the folder whose weights the engine says it has."""
        digests = await asyncio.to_thread(_digests, folder)
        if self._confirmed is None:
            begun = await asyncio.to_thread(_comparable_digests, started_on, folder)
            self._confirmed = ConfirmedState(begun, await self._read_checksums())
        sample: dict[str, set[str]] = {}
        if device == "cuda" and tp_size == 1 and len(self._confirmed.checksums) == 1:
            names = self._confirmed.checksums[0].keys()
            sample = await asyncio.to_thread(sample_checksums, folder, names, version, SAMPLE_BYTES)
        return ExpectedWeights(folder, device == "cpu" and tp_size == 1, digests, sample)

    async def confirm(self, expected: ExpectedWeights) -> None:
        """Raises `EngineError` saying what is wrong."""
        checksums = await self._read_checksums()
        problem, num_exact = "", len(expected.sample)
        if expected.is_byte_exact:
            problem, num_exact = await asyncio.to_thread(
                compare_bytes, expected.folder, expected.digests.keys(), checksums[0]
            )
        problem = problem or self._checksum_mismatch(expected, checksums, num_exact)
        if problem:
            raise EngineError(problem)
        self._confirmed = ConfirmedState(expected.digests, checksums)

    async def _read_checksums(self) -> list[Checksums]:
        """The engine's checksums, by rank."""
        self.is_hashing = True
        try:
            reply = await self._calls.call("/weights_checker", _Checksums, {"action": "checksum"}, self._timeout_s)
        finally:
            self.is_hashing = False
        if not reply.ranks:
            raise EngineError("/weights_checker told of no rank")
        return [rank.checksums for rank in reply.ranks]

    def _checksum_mismatch(self, expected: ExpectedWeights, checksums: Sequence[Checksums], num_exact: int) -> str:
        assert self._confirmed is not None, "expect comes first"
        wrong = [name for name, may_be in expected.sample.items() if checksums[0].get(name) not in may_be]
        if wrong:
            num_sampled = len(expected.sample)
            return (
                f"it holds other bytes for {len(wrong)} of {num_sampled} sampled tensors, {wrong[0]} first (it must "
                "run in the dtype of the weights, model.dtype)"
            )
        if [rank.keys() for rank in checksums] != [rank.keys() for rank in self._confirmed.checksums]:
            return (
                ""
                if expected.is_byte_exact
                else "its tensors or ranks are others than before: start this replica again"
            )
        compared = compare_changes(expected.digests, checksums, self._confirmed)
        if not compared.mismatch:
            self._log_evidence(compared, len(checksums[0]), num_exact)
        return compared.mismatch

    def _log_evidence(self, compared: Comparison, num_tensors: int, num_exact: int) -> None:
        """By what a swap is confirmed: once, until it is by something else."""
        told = _describe_evidence(compared, num_tensors, num_exact)
        if told != self._last_evidence:
            _log.log(logging.INFO if told else logging.WARNING, told or LABEL_ONLY)
        self._last_evidence = told


def _describe_evidence(compared: Comparison, num_tensors: int, num_exact: int) -> str:
    """Empty if nothing could be compared."""
    if not (compared.num_compared or compared.unmatched or num_exact):
        return ""
    told = f"{compared.num_compared} of the engine's {num_tensors} tensors have each changed as the version's have"
    if compared.unmatched:
        told += f"; the {len(compared.unmatched)} whose names say nothing ({compared.unmatched[0]}, …) as a whole"
    return told + (f"; {num_exact} are the file's bit for bit" if num_exact else "")


def _digests(folder: Path) -> dict[str, str]:
    """BLAKE3 of the checkpoint's tensors: the manifest's, where there is one, so that no tensor is read."""
    if (manifest := folder / MANIFEST_FILE).is_file():
        try:
            tensors = msgspec.json.decode(manifest.read_bytes(), type=Manifest).tensors
        except msgspec.MsgspecError as error:
            raise EngineError(f"{manifest} cannot be read: {error}") from error
        return {name: entry.blake3 for name, entry in tensors.items()}
    return _hash_tensors(safetensors_entries(folder))


def _hash_tensors(entries: Iterable[StoredTensor]) -> dict[str, str]:
    return {entry.name: blake3(entry.read()).hexdigest() for entry in entries}


def _comparable_digests(begun: Path, folder: Path) -> dict[str, str]:
    """Digests of the tensors in `begun` that have the same dtype in `folder`; in another equal numbers have other
    bytes. None if `begun` is not here, or is gone while it is read."""
    dtypes = {entry.name: entry.dtype for entry in safetensors_entries(folder)}
    try:
        same = [entry for entry in safetensors_entries(begun) if dtypes.get(entry.name) == entry.dtype]
        if (begun / MANIFEST_FILE).is_file():
            digests = _digests(begun)
            return {entry.name: digests[entry.name] for entry in same if entry.name in digests}
        return _hash_tensors(same)
    except (OSError, ValueError):
        return {}
