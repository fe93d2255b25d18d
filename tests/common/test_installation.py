"""The error for missing packages, and the demo policy of the installed package."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
import torch

import headrace
from headrace.common.config import ModelConfig, RunConfig
from headrace.common.config.recipe import resolve
from headrace.common.models.context_length import load_model_config
from headrace.common.models.tokenizer import load_tokenizer
from headrace.common.preflight.installation import (
    CPU_COMMAND,
    GPU_COMMAND,
    REQUIRED_PACKAGES,
    SGLANG,
    TORCHVISION,
    check_installed,
)
from headrace.common.preflight.recipe import check_model
from headrace.generation.weights.updater import local_model_folder
from headrace.launcher.estimates.model_size import shape_of
from headrace.learner.model.loading import load_pretrained

ROOT = Path(__file__).parents[2]


def model_at(path: str) -> ModelConfig:
    return resolve({"model": {"path": path}, "task": {"name": "arithmetic"}}, "recipe").config.model


def test_missing_packages_are_named_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "aiohttp") else find(name))
    with pytest.raises(ValueError, match=r"^not installed here: aiohttp, torch; expected, [^\n]*$") as refused:
        check_installed()
    assert CPU_COMMAND in str(refused.value) and GPU_COMMAND in str(refused.value)


def test_the_commands_install_what_is_required_in_the_versions_of_the_checkout() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(REQUIRED_PACKAGES) <= {*extras["learner"], *extras["generation"]}
    for file in ("Makefile", "deploy/Dockerfile"):
        assert SGLANG in (text := (ROOT / file).read_text()) and TORCHVISION in text


def test_the_demo_policy_is_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert model_at("headrace/demo/policy").location == "headrace/demo/policy"
    monkeypatch.chdir(tmp_path)
    assert model_at("headrace/demo/policy").location == f"{Path(headrace.__file__).parent}/demo/policy"
    assert model_at("headrace/demo/nothing").location == "headrace/demo/nothing"
    own = tmp_path / "headrace" / "demo" / "policy"
    own.mkdir(parents=True)
    assert model_at("headrace/demo/policy").location == "headrace/demo/policy"


def test_a_run_stores_the_demo_policys_name_and_every_service_finds_it_where_its_own_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve({"model": {"path": "headrace/demo/policy"}, "task": {"name": "arithmetic"}}, "recipe").config
    stored = config.model_dump_json()
    assert str(Path(headrace.__file__).parent) not in stored
    model = RunConfig.model_validate_json(stored).model
    assert model.path == "headrace/demo/policy"
    assert load_tokenizer(model).chat_template and load_model_config(model).vocab_size
    assert local_model_folder(model) == Path(headrace.__file__).parent / "demo" / "policy"
    check_model(config)
    assert shape_of(config).num_parameters > 0
    assert load_pretrained(model, torch.device("cpu"), torch.float32).model.num_parameters() > 0
