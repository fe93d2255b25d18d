"""What of a model on the hub is fetched, and by which revision; no code of a model is run without being told to."""

import json
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects

from headrace.common.config import EngineConfig, LearnerConfig, ModelConfig
from headrace.common.models.context_length import load_model_config
from headrace.common.models.hub import download
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.preflight.recipe import check_model_folder, model_files
from headrace.generation.engine.server import EngineServer
from headrace.generation.weights.updater import local_model_folder
from headrace.learner.model.policy import Policy

LLAMA = [
    "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md", "LICENSE",
    "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "modeling_own.py",
]  # fmt: skip
OTHERS = [
    "consolidated.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx",
    "onnx/config.json", "metal/model.bin", "original/model.safetensors", "model.gguf", "merges.txt", "vocab.json",
    "tokenizer.model", ".gitattributes",
]  # fmt: skip


def fetched(
    monkeypatch: pytest.MonkeyPatch, files: list[str], model: ModelConfig, **how: bool
) -> tuple[list[str], Any]:
    """By the hub's own filter, without a network."""
    asked: dict[str, Any] = {}

    def snapshot(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return "/cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert download(model, **how) == Path("/cache")
    patterns = {name: asked.pop(name) for name in ("allow_patterns", "ignore_patterns")}
    return list(filter_repo_objects(files, **patterns)), asked


def test_of_a_model_the_weights_are_fetched_once_and_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = fetched(monkeypatch, LLAMA + OTHERS, ModelConfig(path="org/model", revision="v1"))
    wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
    top = [name for name in LLAMA + OTHERS if "/" not in name and name != "consolidated.safetensors"]
    assert sorted(found) == sorted(name for name in top if any(fnmatch(name, one) for one in wanted))
    assert asked == {"name": "org/model", "revision": "v1"}
    small, _ = fetched(monkeypatch, LLAMA + OTHERS, ModelConfig(path="org/model"), has_weights=False)
    assert small and not [name for name in small if Path(name).suffix not in (".json", ".jinja")]


def test_code_is_fetched_where_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = fetched(monkeypatch, LLAMA, ModelConfig(path="org/model", trust_remote_code=True))
    assert "modeling_own.py" in found and not [name for name in found if "/" in name]


def test_a_model_without_safetensors_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.path 'org/model': expected weights as \*\.safetensors"):
        local_model_folder(ModelConfig(path="org/model"))


def test_a_revision_of_a_folder_and_an_unknown_one_are_refused(
    monkeypatch: pytest.MonkeyPatch, demo_policy: Path
) -> None:
    with pytest.raises(ValueError, match=r"model\.revision 'v1': model\.path '.*' is not a model on the hub"):
        check_model_folder(str(demo_policy), "v1")

    def refuse(*_: Any, **__: Any) -> str:
        response = httpx.Response(404, request=httpx.Request("GET", "http://x"))
        raise huggingface_hub.errors.RevisionNotFoundError("404", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"model\.revision 'v2': 'org/model' has no such branch, tag or commit"):
        model_files("org/model", "v2")


@pytest.mark.parametrize("is_trusted", [False, True])
def test_revision_and_trust_reach_every_loader(monkeypatch: pytest.MonkeyPatch, is_trusted: bool) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(path: str, **arguments: Any) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    model = ModelConfig(path="org/model", revision="abc", trust_remote_code=is_trusted)
    for name in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    for load in (load_tokenizer, load_model_config, lambda model: Policy(model, LearnerConfig(device="cpu"))):
        with pytest.raises(ValueError, match="no network here"):
            load(model)
    assert len(asked) == 3
    assert all(one["revision"] == "abc" and one["trust_remote_code"] is is_trusted for one in asked)


def test_a_model_with_code_of_its_own_is_refused_without_asking_at_the_terminal(
    demo_policy: Path, tmp_path: Path
) -> None:
    content = json.loads((demo_policy / "config.json").read_text())
    content |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "own.py").write_text("raise SystemExit('code of the model was run')")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        load_model_config(ModelConfig(path=str(tmp_path)))


@pytest.mark.anyio
@pytest.mark.parametrize("is_trusted", [False, True])
async def test_an_engine_runs_code_of_a_model_only_where_it_is_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_trusted: bool
) -> None:
    commands: list[list[str]] = []

    def refuse(command: list[str], **_: Any) -> None:
        commands.append(command)
        raise OSError("enough")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    server = EngineServer(EngineConfig(device="cpu"), "float32", tmp_path / "log", trust_remote_code=is_trusted)
    with pytest.raises(OSError, match="enough"):
        await server.start("m", None)
    assert ("--trust-remote-code" in commands[0]) is is_trusted
