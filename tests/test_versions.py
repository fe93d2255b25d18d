"""Publishing a version: durable files, a growing number, a manifest that the bytes must match, over plain HTTP."""

import hashlib
import json
from pathlib import Path

import httpx
import pytest
import redis
import torch
from safetensors.torch import load_file

from common.http_service import bearer, listen, serve_in_thread, url_of
from common.keys import Keys
from common.weights import MODEL_FILE, WeightsError, decode_manifest, stored_versions, verify, version_folder
from common.wire import Heartbeat, encode
from services.learner.api import Switches, make_app
from services.learner.store import Fenced, LearnerStore
from services.learner.versions import Versions


def make_versions(root: Path, client: redis.Redis, keys: Keys) -> Versions:
    return Versions(root, LearnerStore(client, keys), "http://127.0.0.1:1", "token", num_kept=2)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.full((4,), value, dtype=torch.bfloat16)}


def test_a_version_is_announced_with_the_digest_of_its_manifest(
    tmp_path: Path, client: redis.Redis, keys: Keys
) -> None:
    versions = make_versions(tmp_path, client, keys)
    versions.publish(tensors(1.0), step=0)
    manifest = versions.publish(tensors(2.0), step=1)
    versions.close()
    announced = {key.decode(): value.decode() for key, value in client.hgetall(keys.weights).items()}
    payload = (version_folder(versions.root, 2) / "manifest.json").read_bytes()
    assert announced["version"] == "2" and announced["step"] == "1"
    assert decode_manifest(payload, announced["sha256"]) == manifest
    verify(version_folder(versions.root, 2), manifest)
    loaded = load_file(version_folder(versions.root, 2) / MODEL_FILE)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(2.0).items())
    assert versions.steps == {1: 0, 2: 1} == LearnerStore(client, keys).version_steps()


def test_only_the_newest_versions_stay_on_disk(tmp_path: Path, client: redis.Redis, keys: Keys) -> None:
    versions = make_versions(tmp_path, client, keys)
    for step in range(4):
        versions.publish(tensors(step), step)
    versions.close()
    assert sorted(stored_versions(versions.root)) == [3, 4]


def test_versions_grow_over_restarts_and_over_what_replicas_serve(
    tmp_path: Path, client: redis.Redis, keys: Keys
) -> None:
    first = make_versions(tmp_path, client, keys)
    first.publish(tensors(1.0), 0)
    first.close()
    second = make_versions(tmp_path, client, keys)
    assert second.publish(tensors(1.0), 0).version == 2
    second.close()
    client.set(keys.replica("r"), encode(Heartbeat("r", "http://127.0.0.1:1", "running", "", 40, 0, 0, 0, 0.0, 1.0)))
    third = make_versions(tmp_path, client, keys)
    assert third.publish(tensors(1.0), 0).version == 41
    third.close()
    assert (third.root / "VERSION").read_text() == "41"
    assert [folder.name for folder in tmp_path.iterdir()] == [third.root.name], "a start clears away what came before"


def test_a_fenced_learner_announces_nothing(tmp_path: Path, client: redis.Redis, keys: Keys) -> None:
    older = make_versions(tmp_path, client, keys)
    LearnerStore(client, keys)
    with pytest.raises(Fenced):
        older.publish(tensors(1.0), 0)
    older.close()
    assert not client.exists(keys.weights)


def test_bytes_that_are_not_the_manifests_are_refused(tmp_path: Path, client: redis.Redis, keys: Keys) -> None:
    versions = make_versions(tmp_path, client, keys)
    manifest = versions.publish(tensors(1.0), 0)
    versions.close()
    folder = version_folder(versions.root, 1)
    payload = (folder / "manifest.json").read_bytes()
    with pytest.raises(WeightsError, match="manifest has SHA-256"):
        decode_manifest(payload + b" ", hashlib.sha256(payload).hexdigest())
    content = bytearray((folder / MODEL_FILE).read_bytes())
    content[-1] ^= 1
    (folder / MODEL_FILE).write_bytes(content)
    with pytest.raises(WeightsError, match=r"version 1, model\.safetensors"):
        verify(folder, manifest)


def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, client: redis.Redis, keys: Keys) -> None:
    versions = make_versions(tmp_path, client, keys)
    versions.publish(tensors(1.0), 0)
    versions.close()
    content = json.loads((version_folder(versions.root, 1) / "manifest.json").read_text())
    content["files"] = {"../../etc/passwd": content["files"][MODEL_FILE]}
    payload = json.dumps(content).encode()
    with pytest.raises(WeightsError, match="names a file"):
        decode_manifest(payload, hashlib.sha256(payload).hexdigest())


def test_the_learner_serves_versions_and_obeys_only_with_the_token(
    tmp_path: Path, client: redis.Redis, keys: Keys
) -> None:
    versions = make_versions(tmp_path, client, keys)
    manifest = versions.publish(tensors(1.0), 0)
    versions.close()
    switches, sock = Switches(), listen("127.0.0.1", 0)
    app = make_app(versions.root, lambda: {"paused": switches.paused.is_set()}, switches, "secret")
    with serve_in_thread(app, sock), httpx.Client(base_url=url_of(sock)) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/weights/latest").json()["version"] == 1
        body = http.get(f"/weights/1/{MODEL_FILE}").content
        assert hashlib.sha256(body).hexdigest() == manifest.files[MODEL_FILE].sha256
        part = http.get(f"/weights/1/{MODEL_FILE}", headers={"Range": "bytes=0-9"})
        assert (part.status_code, part.content) == (206, body[:10])
        assert http.get("/weights/9/manifest.json").status_code == 404
        assert http.get("/weights/1/..%2fVERSION").status_code == 404
        for path in ("/pause", "/resume", "/checkpoint", "/stop"):
            refused = http.post(path)
            assert (refused.status_code, refused.headers["content-type"]) == (401, "application/problem+json")
            assert http.post(path, headers=bearer("wrong")).status_code == 401
        assert not switches.paused.is_set() and not switches.stop.is_set()
        assert http.post("/pause", headers=bearer("secret")).json() == {"paused": True}
        assert http.post("/resume", headers=bearer("secret")).json() == {"paused": False}
        http.post("/checkpoint", headers=bearer("secret"))
        http.post("/stop", headers=bearer("secret"))
    assert switches.checkpoint.is_set() and switches.stop.is_set()


def test_a_port_in_use_is_one_clear_error() -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
        listen("127.0.0.1", port)
    sock.close()
