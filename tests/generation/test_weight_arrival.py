"""Fetching a version into local weights: with the fewest bytes, and correct whatever the sources do."""

import asyncio
import contextlib
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from headrace.common.hardware.device import machine_id
from headrace.common.http.addresses import bearer_header
from headrace.common.weights.files import (
    DELTA_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    WeightsError,
    encode_manifest,
    sha256_hex,
    version_folder,
)
from headrace.common.weights.memory_folder import LOCK_FILE, MemoryFolder, memory_backed_folder
from headrace.generation.weights import downloads, local_weights
from headrace.generation.weights.published_version import PublishedVersion
from headrace.generation.weights.version_fetch import FetchedVersion
from headrace.learner.weights import version_writer
from headrace.learner.weights.publisher import ancestors_in_tree
from tests.support.fleet import TOKEN, Fault, Member, Source, Versions, a_source, members
from tests.support.guard import GUARD_S


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(tmp_path / "weights")


@pytest.fixture
def learner(versions: Versions) -> Iterator[Source]:
    with a_source(versions.root) as source:
        yield source


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with the configuration that an engine needs beside the weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"not to be linked")
    return folder


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(GUARD_S):
            await scenario()

    asyncio.run(bounded())


def expect(member: Member, versions: Versions) -> None:
    loaded = load_file(member.local.current_folder / MODEL_FILE)
    assert loaded.keys() == versions.tensors.keys()
    for name, tensor in versions.tensors.items():
        assert loaded[name].dtype == tensor.dtype and bool((loaded[name] == tensor).all())
    assert (member.local.current_folder / "config.json").read_text() == "{}"


def test_an_up_to_date_replica_fetches_only_the_delta(versions: Versions, learner: Source, model: Path) -> None:
    async def scenario() -> None:
        async with members(model) as [member]:
            versions.publish()
            first = await member.take(versions.published(learner.url))
            expect(member, versions)
            assert first.num_bytes == versions.manifests[0].num_model_bytes
            for _ in range(3):
                learner.requests.clear()
                versions.publish()
                fetched = await member.take(versions.published(learner.url))
                expect(member, versions)
                assert [name for name, _ in learner.requests] == [MANIFEST_FILE, DELTA_FILE]
                assert 0 < fetched.num_bytes < 0.02 * first.num_bytes

    run(scenario)


def test_a_replica_that_is_behind_skips_to_the_newest(versions: Versions, learner: Source, model: Path) -> None:
    async def scenario() -> None:
        async with members(model) as [member]:
            versions.publish()
            await member.take(versions.published(learner.url))
            for _ in range(4):
                versions.publish()
            learner.requests.clear()
            await member.take(versions.published(learner.url))
            expect(member, versions)
            assert [name for name, _ in learner.requests].count(DELTA_FILE) == 4
            assert MODEL_FILE not in [name for name, _ in learner.requests]

    run(scenario)


def test_a_new_replica_fetches_an_anchor_and_the_deltas_after_it(
    versions: Versions, learner: Source, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The anchor's file is changed in place: there is space for only one version beside the served one."""
    monkeypatch.setattr(local_weights, "allocate", lambda *_: pytest.fail("a second copy"))

    async def scenario() -> None:
        async with members(model) as [member]:
            for _ in range(4):
                versions.publish()
            await member.take(versions.published(learner.url))
            expect(member, versions)
            assert [name for name, _ in learner.requests].count(MODEL_FILE) == 1

    run(scenario)


def test_a_new_replica_fetches_the_whole_model_of_any_version_from_a_peer(
    versions: Versions, learner: Source, model: Path
) -> None:
    async def scenario() -> None:
        async with members(model, 2) as [one, joiner]:
            for _ in range(3):
                versions.publish()
                await one.take(versions.published(learner.url))
            learner.requests.clear()
            async with one.served() as url:
                await joiner.take(versions.published(learner.url), url)
            expect(joiner, versions)
            assert learner.requests == []

    run(scenario)


@pytest.mark.parametrize("seed", range(4))
def test_every_update_path_gives_the_same_bytes(
    versions: Versions, learner: Source, model: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replicas update at different times while the chain grows over several anchors."""
    monkeypatch.setattr(version_writer, "MAX_CHAIN", 3)
    dice = random.Random(seed)

    async def scenario() -> None:
        async with members(model, 4) as fleet:
            for _ in range(10):
                versions.publish()
                looking = [member for member in fleet if dice.random() < 0.5]
                await asyncio.gather(*(member.take(versions.published(learner.url)) for member in looking))
                for member in looking:
                    expect(member, versions)
                assert len({member.model for member in looking}) <= 1

    run(scenario)


FAULTS: tuple[Fault, ...] = ("absent", "garbage", "truncated", "stalls", "endless", "refuses ranges")


@pytest.mark.parametrize("name", [MANIFEST_FILE, DELTA_FILE, MODEL_FILE])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_a_peer_serves_badly_is_fetched_elsewhere(
    versions: Versions, learner: Source, model: Path, fault: Fault, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "STALL_TIMEOUT_S", 1.0 if fault == "stalls" else GUARD_S)

    async def scenario() -> None:
        async with members(model) as [member]:
            versions.publish()
            if name == DELTA_FILE:
                await member.take(versions.published(learner.url))
                versions.publish()
            with a_source(versions.root) as bad:
                bad.faults[name] = fault
                await member.take(versions.published(learner.url), bad.url)
            expect(member, versions)
            is_refused = fault in ("garbage", "endless")
            expected = (0, 0) if fault == "refuses ranges" else (1, 0) if is_refused else (0, 1)
            assert (member.fetcher.checksum_mismatches[bad.url], member.fetcher.failures[bad.url]) == expected

    run(scenario)


@pytest.mark.parametrize("fault", ["truncated", "stalls"])
def test_the_next_source_continues_an_unfinished_file(
    versions: Versions, learner: Source, model: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "STALL_TIMEOUT_S", 1.0 if fault == "stalls" else GUARD_S)

    async def scenario() -> None:
        async with members(model) as [member]:
            versions.publish()
            with a_source(versions.root) as bad:
                bad.faults[MODEL_FILE] = fault
                fetched = await member.take(versions.published(learner.url), bad.url)
            expect(member, versions)
            num_bytes = versions.manifests[0].num_model_bytes
            assert learner.requests == [(MODEL_FILE, f"bytes={num_bytes // 2}-")]
            assert fetched.num_bytes == num_bytes, "no byte was fetched twice"

    run(scenario)


def test_a_source_that_cannot_continue_is_skipped(versions: Versions, learner: Source, model: Path) -> None:
    async def scenario() -> None:
        async with members(model) as [member]:
            versions.publish()
            with a_source(versions.root) as first, a_source(versions.root) as second:
                first.faults[MODEL_FILE], second.faults[MODEL_FILE] = "truncated", "refuses ranges"
                await member.take(versions.published(learner.url), first.url, second.url)
            expect(member, versions)
            assert member.fetcher.failures[second.url] == 1

    run(scenario)


@pytest.mark.parametrize("num_held", [1, 3])
def test_corrupted_local_weights_are_replaced_by_an_anchor(
    versions: Versions, learner: Source, model: Path, num_held: int
) -> None:
    """A bit of the local file has changed, so the delta's result does not match the digest. The anchor is the served
    version, or the served version is a delta after it."""

    async def scenario() -> None:
        async with members(model) as [member]:
            for _ in range(num_held):
                versions.publish()
                await member.take(versions.published(learner.url))
            path = member.local.current_folder / MODEL_FILE
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
            versions.publish()
            await member.take(versions.published(learner.url))
            expect(member, versions)
            assert not list(member.local.root.glob("*/*.start"))

    run(scenario)


@pytest.mark.parametrize("num_held", [0, 1])
def test_a_version_without_a_correct_source_does_not_affect_the_served_one(
    versions: Versions, learner: Source, model: Path, num_held: int
) -> None:
    async def scenario() -> None:
        async with members(model) as [member]:
            versions.publish()
            if num_held:
                await member.take(versions.published(learner.url))
            versions.publish()
            learner.faults = {DELTA_FILE: "garbage", MODEL_FILE: "garbage"}
            before = member.local.current_folder
            with pytest.raises(WeightsError, match=r"BLAKE3|laid out"):
                await member.take(versions.published(learner.url))
            assert member.local.current_folder == before
            assert list(member.local.root.glob("v*")) == ([before] if num_held else [])
            learner.faults = {}
            await member.take(versions.published(learner.url))
            expect(member, versions)

    run(scenario)


def test_a_manifest_with_wrong_digests_is_detected_before_the_swap(
    versions: Versions, learner: Source, model: Path
) -> None:
    """A learner with broken memory would write such a manifest: everything matches except the resulting tensors."""
    versions.publish()
    path = versions.root / "v00000001" / MANIFEST_FILE
    payload = path.read_bytes()
    digest = versions.manifests[0].tensors["w"].blake3
    path.write_bytes(payload.replace(digest.encode(), b"0" * 64))

    async def scenario() -> None:
        async with members(model) as [member]:
            with pytest.raises(WeightsError, match="tensor w: BLAKE3"):
                await member.take(PublishedVersion(1, sha256_hex(path.read_bytes()), learner.url))

    run(scenario)


def test_a_manifest_of_another_version_is_refused(versions: Versions, learner: Source, model: Path) -> None:
    versions.publish()

    async def scenario() -> None:
        async with members(model) as [member]:
            published = versions.published(learner.url)._replace(version=7)
            (versions.root / "v00000007").symlink_to(versions.root / "v00000001")
            with pytest.raises(WeightsError, match="the manifest is of version 1"):
                await member.take(published)

    run(scenario)


def test_the_learners_folder_is_read_if_it_is_on_this_machine(versions: Versions, learner: Source, model: Path) -> None:
    async def scenario() -> None:
        async with members(model) as [member]:
            here: dict[str, Any] = {"machine": machine_id(), "folder": str(versions.root)}
            for _ in range(2):
                versions.publish()
                await member.take(versions.published(learner.url)._replace(**here))
                expect(member, versions)
            assert learner.requests == []
            for elsewhere in (here | {"machine": "another"}, here | {"folder": "/nowhere"}):
                versions.publish()
                learner.requests.clear()
                await member.take(versions.published(learner.url)._replace(**elsewhere))
                assert len(learner.requests) == 2

    run(scenario)


def test_a_tree_of_replicas_costs_the_learner_one_copy(versions: Versions, learner: Source, model: Path) -> None:
    """All fetch at the same time; the learner's port is slow."""
    num_members = 8

    async def scenario() -> None:
        async with members(model, num_members) as fleet:
            urls: list[str] = []
            async with contextlib.AsyncExitStack() as stack:
                for member in fleet:
                    urls.append(await stack.enter_async_context(member.served()))
                for _ in range(2):
                    versions.publish()
                    learner.num_bytes, learner.bytes_per_s = 0, versions.manifests[0].num_model_bytes / 0.5
                    published = versions.published(learner.url)
                    await asyncio.gather(
                        *(
                            member.take(published, *(urls[above] for above in ancestors_in_tree(place)))
                            for place, member in enumerate(fleet)
                        )
                    )
                    newest = versions.manifests[-1]
                    num_bytes = newest.delta.num_bytes if newest.delta else newest.num_model_bytes
                    assert learner.num_bytes == num_bytes + len(encode_manifest(newest)), "one copy, nothing more"
                    for member in fleet:
                        expect(member, versions)

    run(scenario)


@contextlib.asynccontextmanager
async def flowing(
    versions: Versions, learner: Source, first: Member, second: Member
) -> AsyncIterator[tuple[str, asyncio.Task[FetchedVersion], asyncio.Task[FetchedVersion]]]:
    """The learner has sent half of the model; the second replica has bytes of the first one's download, at that URL."""
    versions.publish()
    published = versions.published(learner.url)
    learner.sends_whole_models.clear()
    async with first.served() as url:
        taking = asyncio.create_task(first.take(published))
        while not any(download.num_arrived for download in first.fetcher.downloads.values()):
            await asyncio.sleep(0.01)
        follow = asyncio.create_task(second.take(published, url))
        while not second.fetcher.num_bytes[url]:
            await asyncio.sleep(0.01)
        yield url, taking, follow


def test_a_file_is_served_while_it_is_downloaded(versions: Versions, learner: Source, model: Path) -> None:
    """The second replica has its first bytes before the first one has its last ones."""

    async def scenario() -> None:
        async with members(model, 2) as [first, second]:
            async with flowing(versions, learner, first, second) as (_, taking, follow):
                assert not taking.done()
                learner.sends_whole_models.set()
                await asyncio.gather(taking, follow)
            expect(second, versions)
            assert second.fetcher.num_bytes[learner.url] == 0

    run(scenario)


def test_a_replica_that_vanishes_in_the_middle_is_replaced_by_the_learner(
    versions: Versions, learner: Source, model: Path
) -> None:
    async def scenario() -> None:
        async with members(model, 2) as [first, second]:
            async with flowing(versions, learner, first, second) as (url, taking, follow):
                taking.cancel()
                await asyncio.gather(taking, return_exceptions=True)
                learner.sends_whole_models.set()
                fetched = await follow
            expect(second, versions)
            assert second.fetcher.num_bytes[url] > 0 and second.fetcher.num_bytes[learner.url] > 0
            assert fetched.num_bytes == versions.manifests[0].num_model_bytes

    run(scenario)


def test_only_files_of_versions_are_served_and_only_with_the_token(
    versions: Versions, learner: Source, model: Path
) -> None:
    async def scenario() -> None:
        async with members(model) as [member]:
            versions.publish()
            await member.take(versions.published(learner.url))
            async with (
                member.served() as url,
                httpx.AsyncClient(base_url=url, trust_env=False, timeout=GUARD_S) as http,
            ):
                path = f"/weights/1/{MODEL_FILE}"
                assert (await http.get(path)).status_code == 401
                http.headers.update(bearer_header(TOKEN))
                whole = await http.get(path)
                assert whole.content == member.model
                part = await http.get(path, headers={"Range": "bytes=5-"})
                assert (part.status_code, part.content) == (206, member.model[5:])
                for absent in ("1/config.json", "1/..%2flock", "1/%2e%2e/lock", f"0/{MODEL_FILE}", f"1/{DELTA_FILE}"):
                    assert (await http.get(f"/weights/{absent}")).status_code == 404, absent

    run(scenario)


def test_deltas_are_kept_for_peers_within_bounds(
    versions: Versions, learner: Source, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_weights, "RETAINED_DELTA_SHARE", 0.05)

    async def scenario() -> None:
        async with members(model) as [member]:
            for _ in range(8):
                versions.publish()
                await member.take(versions.published(learner.url))
            folders = sorted(member.local.root.glob("v*"))
            assert 2 < len(folders) < 8
            assert [folder for folder in folders if (folder / MODEL_FILE).exists()] == [folders[-1]]
            kept = sum(path.stat().st_size for path in member.local.root.glob(f"v*/{DELTA_FILE}"))
            assert kept <= local_weights.RETAINED_DELTA_SHARE * versions.manifests[0].num_model_bytes

    run(scenario)


def test_memory_folders_of_a_killed_replica_are_deleted(
    versions: Versions, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_weights, "memory_backed_folder", lambda: tmp_path)
    alive = local_weights.LocalWeights(model)
    remains = tmp_path / f"{local_weights.PREFIX}dead"
    remains.mkdir()
    (remains / LOCK_FILE).touch()
    local_weights.LocalWeights(model).close()
    assert alive.root.exists() and not remains.exists()
    alive.close()
    assert list(tmp_path.glob(f"{local_weights.PREFIX}*")) == []


def test_the_learners_file_in_memory_is_linked_without_a_copy(
    versions: Versions, learner: Source, model: Path, tmp_path: Path
) -> None:
    """It stays unchanged whatever a replica does; wrong bytes are refused, and fetched elsewhere."""
    memory = MemoryFolder("test-", memory_backed_folder())

    def publish() -> tuple[PublishedVersion, Path]:
        version = versions.publish(memory.root)
        published = versions.published(learner.url)._replace(machine=machine_id(), memory=str(memory.root))
        return published, version_folder(memory.root, version) / MODEL_FILE

    async def scenario() -> None:
        async with members(model, 2) as (one, other):
            first, path = publish()
            arrivals = [await member.take(first) for member in (one, other)]
            assert [fetched.num_bytes for fetched in arrivals] == [0, 0] and all(
                name != MODEL_FILE for name, _ in learner.requests
            )
            assert {(member.local.current_folder / MODEL_FILE).stat().st_ino for member in (one, other)} == {
                path.stat().st_ino
            }
            content = path.read_bytes()
            shutil.rmtree(path.parent)
            assert one.model == other.model == content, "for as long as it is served"

            second, path = publish()
            right = path.read_bytes()
            wrong = right[:-1] + bytes([right[-1] ^ 1])
            path.write_bytes(wrong)
            with pytest.raises(WeightsError):
                await one.take(second)
            assert path.read_bytes() == wrong and one.model == content, "neither file was touched"
            (version_folder(versions.root, 2) / MODEL_FILE).write_bytes(right)
            assert (await one.take(second)).num_bytes == len(right) and one.model == right
            assert not second._replace(machine="elsewhere").shares_memory_with(one.local.root)
            assert not second._replace(memory=str(tmp_path / "gone")).shares_memory_with(one.local.root)

    run(scenario)
    memory.close()
