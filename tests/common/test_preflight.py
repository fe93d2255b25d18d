"""Everything that is refused before anything starts: one line each, and whether the configuration or this machine."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from headrace.common.config import RunConfig
from headrace.common.http.addresses import listen
from headrace.common.models.hub import is_hub_name
from headrace.common.preflight import recipe as preflight
from headrace.common.preflight.recipe import UnavailableHere, check_model_folder, check_run

HUB_MODEL = "acme/tiny-instruct"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was, after each test; and no test asks the network."""
    for name in ("DATASETS_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def model(demo_policy: Path, tmp_path: Path) -> Path:
    """A copy of the demo policy that a test may spoil."""
    return Path(shutil.copytree(demo_policy, tmp_path / "model"))


def refusal(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://hub.invalid"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config_of(model: str | Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": str(model)}, "task": {"name": "arithmetic"}, **sections})


def problem_of(config: RunConfig) -> ValueError:
    with pytest.raises(ValueError) as caught:
        check_run(config)
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_demo_is_right(demo_policy: Path) -> None:
    missing: list[str] = []
    check_run(config_of(demo_policy), missing)
    assert missing == []


def test_a_missing_folder_is_named() -> None:
    assert "'configs/nope': expected a folder with a config.json" in str(problem_of(config_of("configs/nope")))


def test_a_model_without_chat_template_is_refused(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert "has no chat template; expected an instruction-tuned model" in str(problem_of(config_of(model)))
    change_json(model / "tokenizer_config.json", chat_template="{{ messages }}")
    check_model_folder(str(model))


def test_a_model_without_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "expected a tokenizer.json" in str(problem_of(config_of(model)))


def test_a_vocabulary_that_tokenizer_and_model_disagree_on_is_refused(model: Path) -> None:
    num_tokens = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    highest = max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])])
    change_json(model / "config.json", vocab_size=highest)
    expected = f"its tokenizer has {highest + 1} tokens, but the model has {highest} rows"
    assert expected in str(problem_of(config_of(model)))
    change_json(model / "config.json", vocab_size=highest + 1)
    check_model_folder(str(model))

    change_json(model / "config.json", vocab_size=num_tokens)
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": num_tokens + 5, "content": "<|far|>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"has {num_tokens + 6} tokens" in str(problem_of(config_of(model))), "ids count, with their gaps"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_cannot_be_read_is_named(model: Path, name: str) -> None:
    (model / name).write_text("{]")
    assert f"{name} cannot be read" in str(problem_of(config_of(model)))


def test_a_unigram_vocabulary_is_counted(model: Path) -> None:
    change_json(model / "tokenizer.json", model={"type": "Unigram", "vocab": [["a", -1.0]] * 600}, added_tokens=[])
    assert "has 600 tokens" in str(problem_of(config_of(model)))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("configs/nope", False),
        ("./a/b", False),
        ("/a/b", False),
        ("../a", False),
        ("plain", False),
        ("a/b/c", False),
        ("~me/model", False),
    ],
)
def test_a_hub_name_is_no_path(path: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert is_hub_name(path) == expected


@pytest.mark.parametrize(
    ("error", "is_here", "text"),
    [
        (errors.LocalEntryNotFoundError("offline"), False, "not a folder here; as a model on the hub, its files"),
        (httpx.ConnectTimeout("slow"), False, "the hub is unreachable"),
        (errors.RepositoryNotFoundError("404", response=refusal(404)), True, "nor a model that is visible on the hub"),
        (errors.GatedRepoError("403", response=refusal(403)), True, "expected HF_TOKEN"),
    ],
    ids=["offline", "slow", "unknown", "gated"],
)
def test_a_model_that_the_hub_does_not_give(
    error: Exception, is_here: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    problem = problem_of(config_of(HUB_MODEL))
    assert HUB_MODEL in str(problem) and text in str(problem)
    assert isinstance(problem, UnavailableHere) != is_here


def test_of_a_model_on_the_hub_what_is_here_is_checked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model))
    check_model_folder(HUB_MODEL)
    (model / "chat_template.jinja").unlink()
    assert "has no chat template" in str(problem_of(config_of(HUB_MODEL)))
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer.json").unlink()
    check_model_folder(HUB_MODEL)
    (model / "config.json").unlink()
    assert isinstance(problem_of(config_of(HUB_MODEL)), UnavailableHere)


def test_without_sglang_a_servers_url_is_needed(demo_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = problem_of(config_of(demo_policy))
    assert isinstance(problem, UnavailableHere) and "SGLang is not installed" in str(problem)
    check_run(config_of(demo_policy, generation={"engine": {"url": "http://127.0.0.1:30000"}}))


@pytest.mark.parametrize("section", ["learner", "generation"])
def test_a_port_in_use_is_refused_and_a_free_one_left_free(section: str, demo_policy: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        problem = problem_of(config_of(demo_policy, **{section: {"port": port}}))
    assert isinstance(problem, UnavailableHere) and f"{section}.port {port}: cannot listen" in str(problem)
    for _ in range(2):
        check_run(config_of(demo_policy, **{section: {"port": port}}))


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"generation": {"port": 4000, "replicas": 2}}, "generation.port 4000 is one port for 2 replicas"),
        ({"generation": {"port": 4000}, "learner": {"port": 4000}}, "learner.port and generation.port are both 4000"),
    ],
)
def test_one_port_for_two_is_refused(sections: dict[str, Any], text: str, demo_policy: Path) -> None:
    assert text in str(problem_of(config_of(demo_policy, **sections)))


@pytest.mark.parametrize(
    ("url", "is_here", "text"),
    [
        ("redis://:secret@127.0.0.1:1", False, "'redis://:...@127.0.0.1:1' does not answer"),
        ("http://u:secret@host", True, "'http://u:...@host': the URL of Redis cannot be read: expected redis://"),
    ],
)
def test_a_redis_that_is_not_there_is_refused(url: str, is_here: bool, text: str, demo_policy: Path) -> None:
    problem = problem_of(config_of(demo_policy, redis_url=url))
    assert text in str(problem) and "secret" not in str(problem)
    assert isinstance(problem, UnavailableHere) != is_here


def test_what_is_only_not_here_is_collected_and_the_rest_raised(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing: list[str] = []
    check_run(config_of(model, redis_url="redis://127.0.0.1:1"), missing)
    assert [line.split()[0] for line in missing] == ["redis_url", "SGLang"]
    with pytest.raises(ValueError, match="nope"):
        check_run(config_of("configs/nope", redis_url="redis://127.0.0.1:1"), missing)


def test_the_hub_is_asked_once_and_only_where_it_is_needed(demo_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def head(url: str, timeout: float) -> None:
        asked.append(url)
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx, "head", head)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    preflight.prepare_hub(config_of(HUB_MODEL))
    assert asked == [], "told to stay offline"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    preflight.prepare_hub(config_of(demo_policy))
    assert asked == [], "nothing comes from there"
    preflight.prepare_hub(config_of(HUB_MODEL))
    preflight.prepare_hub(config_of(demo_policy, task={"name": "gsm8k"}))
    assert asked == ["http://hub.invalid"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
