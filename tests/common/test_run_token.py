"""The run's token is the same wherever it comes from, whatever white space is around it, and nothing else is one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.common.bootstrap import join_run
from headrace.common.process.run_token import (
    TOKEN_VARIABLE,
    load_or_create_token,
    read_token_file,
    token_from_environment,
)
from headrace.common.process.waiting import Waits
from headrace.launcher.run.control_client import find_control

NO_TOKENS = [" ", "\n", "\t \r\n", "a b", "a\nb", "tökén", "a\x00b", "a" * 5000]


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.mark.parametrize("around", ["{}", "{}\n", " {}", "\t{}\r\n", "\n{} "])
def test_white_space_around_a_token_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, around: str
) -> None:
    path = tmp_path / "token"
    path.write_text(around.format("in-the-file"))
    assert read_token_file(path) == load_or_create_token(path) == "in-the-file"
    monkeypatch.setenv(TOKEN_VARIABLE, around.format("given"))
    assert token_from_environment() == load_or_create_token(path) == "given"


@pytest.mark.parametrize("text", [text for text in NO_TOKENS if "\x00" not in text])
def test_what_can_be_no_token_is_refused_at_every_entrance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, text)
    entrances: dict[str, Callable[[], Any]] = {
        "any": token_from_environment,
        "learner, launcher": lambda: load_or_create_token(tmp_path / "token"),
        "replica, control": lambda: join_run("redis://127.0.0.1:1", "demo", tmp_path / "token", Waits()),
        "command": lambda: find_control("demo", "http://127.0.0.1:1", tmp_path),
    }
    for entrance, enter in entrances.items():
        with pytest.raises(
            ValueError, match=r"^the variable HEADRACE_TOKEN has .*: expected the run's token"
        ) as caught:
            enter()
        assert not text.strip() or text.strip() not in str(caught.value), entrance
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize("text", ["", *NO_TOKENS])
def test_a_file_that_holds_no_token_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(text.encode())
    for enter in (read_token_file, load_or_create_token):
        with pytest.raises(ValueError, match=f"^the file {path} has .*: expected the run's token"):
            enter(path)
    assert path.read_bytes() == text.encode()


def test_a_variable_that_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Compose sets what nobody has given."""
    monkeypatch.setenv(TOKEN_VARIABLE, "")
    assert token_from_environment() is None and read_token_file(tmp_path / "token") is None
    with pytest.raises(ValueError, match="no token: expected the variable HEADRACE_TOKEN or --token-file"):
        join_run("redis://127.0.0.1:1", "demo", None, Waits())


def test_a_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "token"
    token = load_or_create_token(path)
    assert len(token) >= 32 and load_or_create_token(path) == token == path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600 and list(path.parent.iterdir()) == [path]


def test_what_is_not_to_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^the token's file {tmp_path} cannot be read: Is a directory"):
        read_token_file(tmp_path)
