"""The Kubernetes manifests: rendered by kustomize, and held against the API's schemas and against each other."""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from headrace.common.config import load_recipe
from headrace.launcher.estimates.host_memory import disk_rows, shared_memory_bytes
from headrace.launcher.estimates.model_size import read_shape
from headrace.launcher.estimates.traffic import delta_share
from tests.launcher.test_estimates import QWEN_1_5B
from tests.support.guard import GUARD_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu")
API_VERSION = "1.32"
WRITABLE = {"/tmp", "/runs", "/models", "/dev/shm", "/data"}


@cache
def rendered(path: str) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is missing: Debian's package kubernetes-client has it")
    command = ["kubectl", "kustomize", str(DEPLOY / path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """The pod template of each workload, by its name."""
    found = rendered(f"overlays/{overlay}")
    return {one["metadata"]["name"]: one["spec"]["template"] for one in found if "template" in one.get("spec", {})}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_the_schema_of_its_kind(overlay: str) -> None:
    found = rendered(f"overlays/{overlay}")
    kinds = {one["kind"] for one in found}
    assert kinds >= {"Job", "Deployment", "StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    for one in found:
        kubernetes_validate.validate(one, API_VERSION, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    job = next(one for one in rendered("overlays/cpu") if one["kind"] == "Job")
    wrong = json.loads(json.dumps(job))
    wrong["spec"]["template"]["spec"]["containers"][0]["port"] = 8000
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(wrong, API_VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_runs_as_root_or_writes_into_its_image(overlay: str) -> None:
    for name, template in pods(overlay).items():
        assert template["spec"]["securityContext"]["runAsNonRoot"], name
        for container in template["spec"]["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert {mount["mountPath"] for mount in container["volumeMounts"]} <= WRITABLE, name
            assert "livenessProbe" in container and container["resources"]["limits"]["memory"], name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_service_and_policy_selects_a_pod(overlay: str) -> None:
    labels = [template["metadata"]["labels"] for template in pods(overlay).values()]
    for one in rendered(f"overlays/{overlay}"):
        if one["kind"] == "Service":
            selector = one["spec"]["selector"]
        elif one["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            spec = one["spec"]
            selector = spec.get("podSelector", spec.get("selector", {})).get("matchLabels", {})
        else:
            continue
        assert any(selector.items() <= label.items() for label in labels), one["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_come_from_the_secret_alone(overlay: str) -> None:
    for one in rendered(f"overlays/{overlay}"):
        assert one["kind"] != "Secret"
    names = ("HEADRACE_TOKEN", "HEADRACE_REDIS_URL", "REDIS_PASSWORD")
    for template in pods(overlay).values():
        for variable in template["spec"]["containers"][0].get("env", []):
            if variable["name"] in names:
                assert variable["valueFrom"]["secretKeyRef"]["name"] == "headrace"


def test_a_gpu_each() -> None:
    for name in ("learner", "generation"):
        (container,) = pods("gpu")[name]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_volumes_on_gpus_have_room_for_what_check_says() -> None:
    """Of the recipe's model."""
    shape, config = read_shape(QWEN_1_5B), load_recipe(ROOT / "configs" / "gsm8k-qwen2.5-1.5b.yaml").config
    claims = {
        one["metadata"]["name"]: one["spec"]["resources"]["requests"]["storage"]
        for one in rendered("overlays/gpu")
        if one["kind"] == "PersistentVolumeClaim"
    }
    assert claims["runs"] == "200Gi"
    assert 2 * sum(disk_rows(shape, config, delta_share(config)).values()) < 200 << 30
    volumes = {volume["name"]: volume for volume in pods("gpu")["generation"]["spec"]["volumes"]}
    assert volumes["memory"]["emptyDir"]["sizeLimit"] == "16Gi" and shared_memory_bytes(shape, config) < 16 << 30


def test_on_gpus_a_download_has_an_hour_and_kernels_outlive_their_pod() -> None:
    for name in ("learner", "generation"):
        (container,) = pods("gpu")[name]["spec"]["containers"]
        probe = container["startupProbe"]
        assert probe["httpGet"]["port"] == "http", "the base's"
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 3600, name
        assert "/models" in {mount["mountPath"] for mount in container["volumeMounts"]}
    (settings,) = [one["data"] for one in rendered("overlays/gpu") if one["kind"] == "ConfigMap"]
    assert settings["SGLANG_JIT_CACHE_DIR"].startswith("/models/")


def test_keda_scales_the_deployment() -> None:
    (scaled,) = rendered("keda")
    assert scaled["kind"] == "ScaledObject"
    assert scaled["spec"]["scaleTargetRef"]["name"] in pods("cpu")
