"""Which files bring a replica from the version it holds, if any, to the newest one in the fewest bytes.

Either the deltas since the version it holds, or a whole model and the deltas after it. The chain of manifests is
followed from the newest one back; each vouches for the one before.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from headrace.common.weights.files import Manifest, WeightsError
from headrace.generation.weights.local_weights import LocalVersion

MAX_CHAIN = 64
Ask = Callable[[int, str], Awaitable[Manifest]]
"""For the manifest of a version, with that SHA-256."""


class UpdatePath(NamedTuple):
    """`model` is whose model's file is fetched first, None to start from the held one; `deltas` are applied to it, in
    this order."""

    model: Manifest | None
    deltas: list[Manifest]

    @property
    def num_bytes(self) -> int:
        whole = self.model.num_model_bytes if self.model else 0
        return whole + sum(one.delta.num_bytes for one in self.deltas if one.delta)


async def find_update_paths(
    newest: Manifest, held: LocalVersion | None, can_be_whole: bool, ask: Ask
) -> list[UpdatePath]:
    """Those that there are, the fewest bytes first. `can_be_whole`: somebody has the newest version's model even if it
    is no anchor. Raises `WeightsError` if there are none."""
    found = [UpdatePath(newest, [])] if can_be_whole and not newest.has_model else []
    manifest, deltas, problem = newest, list[Manifest](), "no anchor"
    while len(deltas) <= MAX_CHAIN:
        if manifest.has_model:
            found.append(UpdatePath(manifest, deltas))
        if manifest.delta is None:
            break
        deltas = [manifest, *deltas]
        if held is not None and manifest.delta.base_sha256 == held.sha256:
            found.append(UpdatePath(None, deltas))
            break
        if found and UpdatePath(None, deltas).num_bytes >= min(update_path.num_bytes for update_path in found):
            break
        try:
            manifest = await ask(manifest.delta.base, manifest.delta.base_sha256)
        except WeightsError as error:  # deleted: nobody needs it who could not start from an anchor
            problem = str(error)
            break
    if not found:
        raise WeightsError(f"version {newest.version} cannot be built: {problem}")
    return sorted(found, key=lambda update_path: update_path.num_bytes)
