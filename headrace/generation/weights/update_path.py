"""Finds the files that update a replica to the newest version with the fewest bytes.

These are either the deltas since the replica's version, or a whole model and the deltas after it. The chain of
manifests is followed backwards from the newest one; each has the hash of the one before.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from headrace.common.weights.files import Manifest, WeightsError
from headrace.generation.weights.local_weights import LocalVersion

MAX_CHAIN = 64
FetchManifest = Callable[[int, str], Awaitable[Manifest]]
"""Returns the manifest of a version, with that SHA-256."""


class UpdatePath(NamedTuple):
    """The version whose whole model is fetched (`model`, None to start from the local one), and the versions whose
    deltas are then applied, in order."""

    model: Manifest | None
    deltas: list[Manifest]

    @property
    def num_bytes(self) -> int:
        whole = self.model.num_model_bytes if self.model else 0
        return whole + sum(one.delta.num_bytes for one in self.deltas if one.delta)


async def find_update_paths(
    newest: Manifest, local: LocalVersion | None, can_be_whole: bool, fetch_manifest: FetchManifest
) -> list[UpdatePath]:
    """The possible update paths, the one with the fewest bytes first. Raises `WeightsError` if there is none.

    `can_be_whole`: peers may have the whole model of the newest version even if it is not an anchor.
    """
    found = [UpdatePath(newest, [])] if can_be_whole and not newest.has_model else []
    manifest, deltas, problem = newest, list[Manifest](), "no anchor"
    while len(deltas) <= MAX_CHAIN:
        if manifest.has_model:
            found.append(UpdatePath(manifest, deltas))
        if manifest.delta is None:
            break
        deltas = [manifest, *deltas]
        if local is not None and manifest.delta.base_sha256 == local.sha256:
            found.append(UpdatePath(None, deltas))
            break
        if found and UpdatePath(None, deltas).num_bytes >= min(path.num_bytes for path in found):
            break
        try:
            manifest = await fetch_manifest(manifest.delta.base, manifest.delta.base_sha256)
        except WeightsError as error:  # deleted: replicas that would need it start from an anchor
            problem = str(error)
            break
    if not found:
        raise WeightsError(f"version {newest.version} cannot be built: {problem}")
    return sorted(found, key=lambda path: path.num_bytes)
