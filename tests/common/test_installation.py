"""The error for missing packages, and the demo policy of the installed package."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

import headrace
from headrace.common.config.recipe import resolve
from headrace.common.preflight.installation import LIBRARIES, ON_CPU, ON_GPU, SGLANG, TORCHVISION, check_installed

ROOT = Path(__file__).parents[2]


def path_of(path: str) -> str:
    return resolve({"model": {"path": path}, "task": {"name": "arithmetic"}}, "recipe").config.model.path


def test_missing_packages_are_named_with_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "aiohttp") else find(name))
    with pytest.raises(ValueError, match=r"^not installed here: aiohttp, torch; expected, [^\n]*$") as refused:
        check_installed()
    assert ON_CPU in str(refused.value) and ON_GPU in str(refused.value)


def test_the_commands_install_what_is_required_in_the_versions_of_the_checkout() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(LIBRARIES) <= {*extras["learner"], *extras["generation"]}
    for file in ("Makefile", "deploy/Dockerfile"):
        assert SGLANG in (text := (ROOT / file).read_text()) and TORCHVISION in text


def test_the_demo_policy_is_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert path_of("headrace/demo/policy") == "headrace/demo/policy"
    monkeypatch.chdir(tmp_path)
    assert path_of("headrace/demo/policy") == f"{Path(headrace.__file__).parent}/demo/policy"
    assert path_of("headrace/demo/nothing") == "headrace/demo/nothing"
    own = tmp_path / "headrace" / "demo" / "policy"
    own.mkdir(parents=True)
    assert path_of("headrace/demo/policy") == "headrace/demo/policy"
