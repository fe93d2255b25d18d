"""Confirms that an engine holds the weights of a swap, and keeps what it was last confirmed to hold.

`expect` runs before the pause; `confirm` then reads the engine's checksums and compares them (`tensors.verification`).
On a CPU with one rank, the bytes of every tensor are compared with the file's. On CUDA with one rank, those of a sample
are, a different one for each version, and `confirm` opens no file. On any device, each tensor must have changed exactly
if its digest in the version's manifest has changed. The first swap is compared with the folder that the engine reports
as its source. If that folder is gone, the earlier state is unknown, and the log says so.
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
"""Size of the sample of tensors that is hashed at a swap on CUDA: a fraction of a second of one core."""
LABEL_ONLY = "the swap is confirmed by the engine's label alone: the weights that it held before are unknown"
_log = logging.getLogger(__name__)


class ExpectedWeights(NamedTuple):
    """What an engine must hold after it has loaded `folder`."""

    folder: Path
    is_byte_exact: bool
    """The bytes of every tensor can be compared with the file's."""
    digests: dict[str, str]
    """BLAKE3 by the name of the checkpoint's tensor."""
    sample: dict[str, set[str]]
    """The allowed checksums of the sampled tensors, by the engine's name."""


class _Rank(msgspec.Struct):
    checksums: Checksums


class _Checksums(msgspec.Struct):
    ranks: list[_Rank]


class SwapConfirmer:
    """Confirms the swaps of one engine. `timeout_s` is the deadline for hashing its tensors."""

    def __init__(self, calls: EngineCalls, timeout_s: float) -> None:
        self.is_hashing = False
        """Whether the engine hashes its tensors; it may compile a kernel first, and answers no probes meanwhile."""
        self._calls = calls
        self._timeout_s = timeout_s
        self._confirmed: ConfirmedState | None = None
        self._last_evidence: str | None = None

    async def expect(self, folder: Path, version: int, started_on: Path, device: str, tp_size: int) -> ExpectedWeights:
        """What to expect after the swap. `started_on`: the folder that the engine reports as its source."""
        digests = await asyncio.to_thread(_digests, folder)
        if self._confirmed is None:
            before = await asyncio.to_thread(_comparable_digests, started_on, folder)
            self._confirmed = ConfirmedState(before, await self._read_checksums())
        sample: dict[str, set[str]] = {}
        if device == "cuda" and tp_size == 1 and len(self._confirmed.checksums) == 1:
            names = self._confirmed.checksums[0].keys()
            sample = await asyncio.to_thread(sample_checksums, folder, names, version, SAMPLE_BYTES)
        return ExpectedWeights(folder, device == "cpu" and tp_size == 1, digests, sample)

    async def confirm(self, expected: ExpectedWeights) -> None:
        """Raises `EngineError` with the reason if the engine does not hold the expected weights."""
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
            raise EngineError("/weights_checker reported no rank")
        return [rank.checksums for rank in reply.ranks]

    def _checksum_mismatch(self, expected: ExpectedWeights, checksums: Sequence[Checksums], num_exact: int) -> str:
        """Describes the first mismatch; empty if there is none."""
        assert self._confirmed is not None, "expect() comes before confirm()"
        wrong = [name for name, may_be in expected.sample.items() if checksums[0].get(name) not in may_be]
        if wrong:
            num_sampled = len(expected.sample)
            return (
                f"it holds other bytes for {len(wrong)} of {num_sampled} sampled tensors, {wrong[0]} first (it must "
                "run in the dtype of the weights, model.dtype)"
            )
        if [rank.keys() for rank in checksums] != [rank.keys() for rank in self._confirmed.checksums]:
            changed = "its tensors or ranks are not the same as before: restart this replica"
            return "" if expected.is_byte_exact else changed
        compared = compare_changes(expected.digests, checksums, self._confirmed)
        if not compared.mismatch:
            self._log_evidence(compared, len(checksums[0]), num_exact)
        return compared.mismatch

    def _log_evidence(self, compared: Comparison, num_tensors: int, num_exact: int) -> None:
        """Logs how a swap was confirmed, if that differs from the last time."""
        evidence = _describe_evidence(compared, num_tensors, num_exact)
        if evidence != self._last_evidence:
            _log.log(logging.INFO if evidence else logging.WARNING, evidence or LABEL_ONLY)
        self._last_evidence = evidence


def _describe_evidence(compared: Comparison, num_tensors: int, num_exact: int) -> str:
    """Empty if nothing could be compared."""
    if not (compared.num_compared or compared.unmatched or num_exact):
        return ""
    text = f"{compared.num_compared} of the engine's {num_tensors} tensors have each changed as the version's have"
    if compared.unmatched:
        text += f"; {len(compared.unmatched)} with unknown names ({compared.unmatched[0]}, …) have as a whole"
    return text + (f"; {num_exact} are the file's bit for bit" if num_exact else "")


def _digests(folder: Path) -> dict[str, str]:
    """BLAKE3 of the checkpoint's tensors; taken from the manifest if there is one, so that no tensor is read."""
    if (manifest := folder / MANIFEST_FILE).is_file():
        try:
            tensors = msgspec.json.decode(manifest.read_bytes(), type=Manifest).tensors
        except msgspec.MsgspecError as error:
            raise EngineError(f"{manifest} cannot be read: {error}") from error
        return {name: entry.blake3 for name, entry in tensors.items()}
    return _hash_tensors(safetensors_entries(folder))


def _hash_tensors(entries: Iterable[StoredTensor]) -> dict[str, str]:
    return {entry.name: blake3(entry.read()).hexdigest() for entry in entries}


def _comparable_digests(before: Path, folder: Path) -> dict[str, str]:
    """Digests of the tensors in `before` that have the same dtype in `folder`; with another dtype, equal numbers have
    different bytes. Empty if `before` does not exist or is deleted while it is read."""
    dtypes = {entry.name: entry.dtype for entry in safetensors_entries(folder)}
    try:
        same = [entry for entry in safetensors_entries(before) if dtypes.get(entry.name) == entry.dtype]
        if (before / MANIFEST_FILE).is_file():
            digests = _digests(before)
            return {entry.name: digests[entry.name] for entry in same if entry.name in digests}
        return _hash_tensors(same)
    except (OSError, ValueError):
        return {}
