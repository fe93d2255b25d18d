"""Publishing a version: durable files, a growing number, a manifest that the bytes must match, over plain HTTP."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import torch
from safetensors.torch import load_file

from headrace.common.http.addresses import bearer_header, listen, socket_url
from headrace.common.http.service import serve_in_thread
from headrace.common.redis.keys import Keys
from headrace.common.weights.files import (
    DELTA_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    Manifest,
    WeightsError,
    decode_manifest,
    sha256_hex,
    stored_versions,
    version_folder,
)
from headrace.common.wire import Heartbeat, encode
from headrace.learner.reporting.http_api import make_app
from headrace.learner.steering import switches as switches_module
from headrace.learner.steering.switches import Switches
from headrace.learner.store.fenced_redis import Fenced
from headrace.learner.store.store import LearnerStore
from headrace.learner.weights.publisher import WeightVersions, ancestors_in_tree


def make_versions(root: Path, client: redis.Redis, keys: Keys) -> WeightVersions:
    return WeightVersions(root, LearnerStore(client, keys), "http://127.0.0.1:1", "token")


def publish(versions: WeightVersions, weights: Mapping[str, torch.Tensor], step: int) -> Manifest:
    return versions.publish(versions.snapshot(weights), step, versions.reserve())


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.full((4,), value, dtype=torch.bfloat16)}


def test_a_version_is_announced_with_the_digest_of_its_manifest(
    tmp_path: Path, client: redis.Redis, keys: Keys
) -> None:
    versions = make_versions(tmp_path, client, keys)
    publish(versions, tensors(1.0), 0)
    manifest = publish(versions, tensors(2.0), 1)
    versions.close()
    announced = {key.decode(): value.decode() for key, value in client.hgetall(keys.weights).items()}
    payload = (version_folder(versions.root, 2) / "manifest.json").read_bytes()
    assert announced["version"] == "2" and announced["step"] == "1"
    assert decode_manifest(payload, announced["sha256"]) == manifest
    assert manifest.delta is not None and manifest.delta.base == 1
    assert manifest.delta.base_sha256 == sha256_hex((version_folder(versions.root, 1) / MANIFEST_FILE).read_bytes())
    assert announced["folder"] == str(versions.root) and announced["machine"]
    assert versions.steps == {1: 0, 2: 1} == LearnerStore(client, keys).version_steps()


def test_an_anchor_is_an_ordinary_safetensors_file(tmp_path: Path, client: redis.Redis, keys: Keys) -> None:
    versions = make_versions(tmp_path, client, keys)
    published = tensors(1.5) | {"half": torch.ones(2, 1, dtype=torch.float16), "empty": torch.empty(0, 3)}
    assert publish(versions, published, 0).has_model
    versions.close()
    loaded = load_file(version_folder(versions.root, 1) / MODEL_FILE)
    assert loaded.keys() == published.keys()
    for name, tensor in published.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def small_steps(num_versions: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Versions that each change a random 1 % of the one before by a unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2**14, (100, 200), dtype=torch.int16, generator=generator)
    for _ in range(num_versions):
        yield {"a": bits.view(torch.bfloat16).clone(), "b": torch.ones(3)}
        bits += (torch.rand(bits.shape, generator=generator) < 0.01).to(torch.int16)


def test_small_steps_are_written_as_deltas_with_occasional_anchors(
    tmp_path: Path, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.learner.weights.version_writer.MAX_CHAIN", 3)
    versions = make_versions(tmp_path, client, keys)
    manifests = [publish(versions, step, index) for index, step in enumerate(small_steps(10))]
    versions.close()
    assert [manifest.has_model for manifest in manifests] == [True, False, False, False] * 2 + [True, False]
    deltas = [manifest.delta for manifest in manifests[1:]]
    assert all(delta is not None and delta.num_bytes < 0.02 * manifests[0].num_model_bytes for delta in deltas)
    assert sorted(stored_versions(versions.root)) == [5, 6, 7, 8, 9, 10], "from the last anchor but one on"
    files = {path.name for path in version_folder(versions.root, 9).iterdir()}
    assert files == {MANIFEST_FILE, MODEL_FILE, DELTA_FILE}, "an anchor costs replicas that are up to date nothing more"


def test_large_steps_are_written_as_anchors(tmp_path: Path, client: redis.Redis, keys: Keys) -> None:
    versions = make_versions(tmp_path, client, keys)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        bits = torch.randint(-(2**31), 2**31 - 1, (1000,), dtype=torch.int32, generator=generator)
        manifest = publish(versions, {"a": bits.view(torch.float32)}, step)
        assert manifest.has_model and manifest.delta is None
        assert not (version_folder(versions.root, manifest.version) / DELTA_FILE).exists()
    versions.close()
    assert sorted(stored_versions(versions.root)) == [3, 4]


def test_after_a_disk_error_the_next_version_is_written_as_usual(
    tmp_path: Path, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = make_versions(tmp_path, client, keys)
    steps = small_steps(4)
    publish(versions, next(steps), 0)
    with monkeypatch.context() as patch:
        patch.setattr("headrace.learner.weights.version_writer.publish_atomically", refuse)
        with pytest.raises(OSError, match="No space"):
            publish(versions, next(steps), 1)
    manifest = publish(versions, next(steps), 2)
    assert manifest.delta is not None and manifest.delta.base == 1, "the failed version is not a base"
    versions.close()


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_version_does_not_change_when_the_weights_are_updated(
    tmp_path: Path, client: redis.Redis, keys: Keys
) -> None:
    """The learner's tensors are its parameters, which the next step overwrites."""
    versions = make_versions(tmp_path, client, keys)
    parameter = torch.zeros(1000)
    publish(versions, {"a": parameter}, 0)
    parameter[:3] = 1.0
    manifest = publish(versions, {"a": parameter}, 1)
    versions.close()
    assert manifest.delta is not None and manifest.delta.patches["a"].num_changed == 3


def beat(client: redis.Redis, keys: Keys, name: str, *, shares_memory: bool) -> None:
    heartbeat = Heartbeat(name, "http://127.0.0.1:1", "running", "", 1, 0, 0, 0, 0.0, 1.0, shares_memory=shares_memory)
    client.set(keys.replica(name), encode(heartbeat))


def test_a_version_is_in_memory_for_replicas_that_share_it(
    tmp_path: Path, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files for other replicas are written only while there are others; a new replica can reach the newest version at
    any time."""
    versions = make_versions(tmp_path, client, keys)
    steps = small_steps(9)

    def next_files() -> tuple[set[str], set[str]]:
        manifest = publish(versions, next(steps), 0)
        memory = version_folder(versions.memory, manifest.version)
        assert manifest.has_model == (versions.file_of(manifest.version, MODEL_FILE) is not None)
        assert len(list(versions.memory.glob("v*"))) <= 2
        disk = {path.name for path in version_folder(versions.root, manifest.version).iterdir()}
        return disk - {MANIFEST_FILE}, {path.name for path in memory.iterdir()} if memory.exists() else set()

    assert next_files() == ({MODEL_FILE}, set()) and next_files() == ({DELTA_FILE}, set())
    beat(client, keys, "a", shares_memory=True)
    for _ in range(2):
        assert next_files() == (set(), {MODEL_FILE}), "no replica needs it"
    loaded, expected = load_file(version_folder(versions.memory, 4) / MODEL_FILE), list(small_steps(4))[-1]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    beat(client, keys, "b", shares_memory=False)
    assert next_files() == ({DELTA_FILE}, {MODEL_FILE})
    client.delete(keys.replica("a"))
    assert next_files() == ({DELTA_FILE, MODEL_FILE}, set()), (
        "the chain of deltas begins with a version that is no longer in memory"
    )
    assert next_files() == ({DELTA_FILE}, set()) and not list(versions.memory.glob("v*"))
    beat(client, keys, "a", shares_memory=True)
    client.delete(keys.replica("b"))
    monkeypatch.setattr(versions, "_has_room", lambda _: False)
    assert next_files() == ({DELTA_FILE}, set()), "publishing does not wait while the memory is full"
    versions.close()
    assert not versions.memory.exists()


def test_replicas_form_a_tree_under_the_learner() -> None:
    assert [ancestors_in_tree(place) for place in range(8)] == [[], [0], [0], [1, 0], [1, 0], [2, 0], [2, 0], [3, 1, 0]]


def test_versions_grow_over_restarts_and_over_what_replicas_serve(
    tmp_path: Path, client: redis.Redis, keys: Keys
) -> None:
    first = make_versions(tmp_path, client, keys)
    publish(first, tensors(1.0), 0)
    first.close()
    second = make_versions(tmp_path, client, keys)
    assert publish(second, tensors(1.0), 0).version == 2
    second.close()
    client.set(keys.replica("r"), encode(Heartbeat("r", "http://127.0.0.1:1", "running", "", 40, 0, 0, 0, 0.0, 1.0)))
    third = make_versions(tmp_path, client, keys)
    assert publish(third, tensors(1.0), 0).version == 41
    third.close()
    assert (third.root / "VERSION").read_text() == "41"
    assert [folder.name for folder in tmp_path.iterdir()] == [third.root.name], (
        "a start deletes the folders of earlier epochs"
    )


def test_a_fenced_learner_announces_nothing(tmp_path: Path, client: redis.Redis, keys: Keys) -> None:
    older = make_versions(tmp_path, client, keys)
    LearnerStore(client, keys)
    with pytest.raises(Fenced):
        publish(older, tensors(1.0), 0)
    older.close()
    assert not client.exists(keys.weights)


Json = dict[str, Any]


def change_delta(content: Json, **changes: object) -> None:
    content["delta"] |= changes


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content["tensors"]["a"].update(dtype="bfloat17"), "dtype 'bfloat17', expected one of"),
        (lambda content: content["tensors"]["a"].update(shape=[1 << 40, 1 << 40]), "expected at most"),
        (lambda content: content["tensors"]["a"].update(shape=[-1, 2]), "cannot be read"),
        (lambda content: content["tensors"]["a"].update(blake3="../../etc/passwd"), "cannot be read"),
        (lambda content: content.update(has_model=False, delta=None), "expected an anchor or a delta"),
        (lambda content: content.update(version=1 << 60), "cannot be read"),
        (lambda content: change_delta(content, base=2), "a delta against version 2, expected an earlier one"),
        (lambda content: change_delta(content, num_bytes=5), "in 5"),
        (lambda content: content["delta"]["patches"].pop("a"), "a patch for every tensor"),
        (lambda content: content["delta"]["patches"]["a"].update(frame_bytes=[-1, 1]), "negative length"),
        (lambda content: content["delta"]["patches"]["a"].update(method="eval"), "cannot be read"),
    ],
)
def test_a_manifest_of_impossible_tensors_is_refused(
    tmp_path: Path, client: redis.Redis, keys: Keys, change: Callable[[Json], object], problem: str
) -> None:
    versions = make_versions(tmp_path, client, keys)
    publish(versions, tensors(1.0), 0)
    publish(versions, tensors(2.0), 1)
    versions.close()
    payload = (version_folder(versions.root, 2) / MANIFEST_FILE).read_bytes()
    decode_manifest(payload, sha256_hex(payload))
    with pytest.raises(WeightsError, match="manifest has SHA-256"):
        decode_manifest(payload + b" ", sha256_hex(payload))
    content = json.loads(payload)
    change(content)
    payload = json.dumps(content).encode()
    with pytest.raises(WeightsError, match=problem):
        decode_manifest(payload, sha256_hex(payload))


def test_the_learner_serves_versions_and_accepts_commands_only_with_the_token(
    tmp_path: Path, client: redis.Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = make_versions(tmp_path, client, keys)
    manifest = publish(versions, tensors(1.0), 0)
    versions.close()
    switches, sock = Switches(), listen("127.0.0.1", 0)
    in_memory = tmp_path / "in memory"
    app = make_app(versions.root, lambda: {"paused": switches.paused.is_set()}, switches, "secret", in_memory)
    monkeypatch.setattr(switches_module, "PERSIST_TIMEOUT_S", 0.01)  # nobody writes them
    with serve_in_thread(app, sock), httpx.Client(base_url=socket_url(sock)) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        for path in ("/weights/latest", f"/weights/1/{MODEL_FILE}"):
            assert http.get(path).status_code == http.get(path, headers=bearer_header("wrong")).status_code == 401
        allowed = bearer_header("secret")
        assert http.get("/weights/latest", headers=allowed).json()["version"] == 1
        body = http.get(f"/weights/1/{MODEL_FILE}", headers=allowed).content
        assert body == (version_folder(versions.root, 1) / MODEL_FILE).read_bytes()
        assert len(body) == manifest.num_model_bytes
        (version_folder(versions.root, 1) / MODEL_FILE).rename(tmp_path / MODEL_FILE)
        assert http.get(f"/weights/1/{MODEL_FILE}", headers=allowed).status_code == 404
        version_folder(in_memory, 1).mkdir(parents=True)
        (tmp_path / MODEL_FILE).rename(version_folder(in_memory, 1) / MODEL_FILE)
        part = http.get(f"/weights/1/{MODEL_FILE}", headers=allowed | {"Range": "bytes=10-"})
        assert (part.status_code, part.content) == (206, body[10:])
        (version_folder(versions.root, 1) / DELTA_FILE).symlink_to("/etc/passwd")
        absent = [
            "9/manifest.json",
            "1/..%2fVERSION",
            "1/..%2f..%2f..%2fetc%2fpasswd",
            f"1/{DELTA_FILE}",
            "1/.",
            "-1/x",
        ]
        for path in (*absent, "1/%2e%2e/VERSION", "00000001/VERSION"):
            assert http.get(f"/weights/{path}", headers=allowed).status_code == 404, path
        for path in ("/pause", "/resume", "/checkpoint", "/stop"):
            refused = http.post(path)
            assert (refused.status_code, refused.headers["content-type"]) == (401, "application/problem+json")
            assert http.post(path, headers=bearer_header("wrong")).status_code == 401
        assert not switches.paused.is_set() and not switches.stop.is_set()
        assert http.post("/pause", headers=bearer_header("secret")).json() == {"paused": True}
        assert http.post("/resume", headers=bearer_header("secret")).json() == {"paused": False}
        http.post("/checkpoint", headers=bearer_header("secret"))
        http.post("/stop", headers=bearer_header("secret"))
    assert switches.unpersisted == [
        ("HSET", "paused", 1),
        ("HDEL", "paused"),
        ("HINCRBY", "checkpoints", 1),
        ("HSET", "stop", 1),
    ]
    assert switches.stop.is_set()


def test_a_port_in_use_is_one_clear_error() -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        listen("127.0.0.1", port)
    sock.close()
