"""The `headrace` command as people run it: what it refuses, in one line and leaving nothing, and what `check` says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace.common.config import RunConfig, load_recipe
from headrace.common.http.addresses import listen
from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from tests.support.factories import make_group, make_ticket
from tests.support.guard import GUARD_S

ROOT = Path(__file__).parents[2]
TINY = "configs/tiny-cpu.yaml"
GSM8K = "configs/gsm8k-qwen2.5-1.5b.yaml"
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def headrace(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without a terminal, in a narrow world, and away from the network."""
    return subprocess.run(
        [sys.executable, "-m", "headrace.launcher", *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "40", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )


def caches(folder: Path) -> dict[str, str]:
    """Variables that keep this machine's own caches out of it."""
    return {"HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub"), "HF_DATASETS_CACHE": str(folder / "datasets")}


def refused(result: subprocess.CompletedProcess[str], text: str) -> None:
    assert result.returncode == 2, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("headrace: ") and text in line


def settings_of(config: RunConfig) -> Iterator[str]:
    def names(section: dict[str, Any], prefix: str) -> Iterator[str]:
        for key, value in section.items():
            if isinstance(value, dict) and key not in ("settings", "chat_template_settings"):  # their own keys
                yield from names(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    return names(config.model_dump(), "")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((TINY, "--set", "learner.group_per_step=4"), "did you mean learner.groups_per_step?"),
        ((TINY, "--set", "actor.group_size=1"), "group_size 1 has no group mean"),
        ((TINY, "--set", "model.path=configs/nope"), "expected a folder with a config.json"),
        ((TINY, "--set", "task.name=arithmetik"), "did you mean 'arithmetic'?"),
        ((TINY, "--run", "../elsewhere"), "run '../elsewhere': expected"),
        (
            (TINY, "--set", "sampling.max_new_tokens=1010"),
            "leaves room for sampling.max_new_tokens 1,010 in the context of 1,024 tokens",
        ),
        (("configs/nope.yaml",), "configs/nope.yaml: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    refused(headrace("up", *arguments, "--runs-folder", str(tmp_path / "runs")), text)
    assert not (tmp_path / "runs").exists()


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        setting = f"learner.port={port}"
        refused(headrace("up", TINY, "--set", setting, "--runs-folder", str(tmp_path / "runs")), f"learner.port {port}")
        checked = headrace("check", TINY, "--set", setting)
    assert not (tmp_path / "runs").exists()
    assert checked.returncode == 0
    assert f"note: learner.port {port}: cannot listen on 127.0.0.1:{port}: Address already in use\n" in checked.stdout


def test_a_broken_data_file_is_one_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", ')
    refused(headrace("check", TINY, "--set", "task.name=gsm8k", "--set", f"task.settings.path={rows}"), str(rows))


def test_a_mistake_in_a_tasks_prompts_is_one_line() -> None:
    task = ["--set", "task.name=tests.launcher.test_task_check:Told", "--set", "task.settings={train: no role}"]
    refused(headrace("check", TINY, *task), "train prompt 0: its messages are list ['1 + 1?']")


def test_check_prints_every_setting_once_with_its_source(tmp_path: Path) -> None:
    overrides = ["learner.steps=3", "actor.preset=token", "redis_url=redis://:secret@127.0.0.1:1"]
    result = headrace("check", TINY, *[part for override in overrides for part in ("--set", override)])
    assert (result.returncode, result.stderr) == (0, "")
    settings, _, rest = result.stdout.partition("\n\nnote: ")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in settings.splitlines() if line}
    names = [line.split()[0] for line in settings.splitlines() if line]
    assert sorted(names) == sorted(settings_of(load_recipe(ROOT / TINY).config)), "each once"
    assert rows["learner.steps"] == ["3", "--set learner.steps=3"]
    assert rows["learner.groups_per_step"] == ["16", TINY]
    assert rows["actor.importance_sampling_level"] == ["token", "preset token"]
    assert rows["learner.max_staleness"] == ["2", "default"]
    assert rows["learner.num_threads"] == ["1", TINY]
    assert rows["actor.dual_clip"] == ["null", "default"]
    assert "secret" not in result.stdout
    columns = {
        line.index(source) for line in settings.splitlines() for source in [" default", f" {TINY}"] if source in line
    }
    assert len(columns) == 1, "aligned, and no line is broken in a pipe of any width"
    assert rest.startswith("redis_url ")
    assert "estimates, for 656,448 parameters\nlearner" in rest
    titles = {line.split()[0] for line in rest.splitlines() if not line.startswith(" ") and line}
    assert titles >= {"prompts", "template", "estimates,", "learner", "engine", "host", "disk", "moved", "time"}
    assert "100  train prompts tried: 18 to 27 tokens" in rest


def test_check_of_a_model_and_data_that_are_not_here(tmp_path: Path) -> None:
    result = headrace("check", GSM8K, **caches(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    first, second = [line for line in result.stdout.splitlines() if line.startswith("note: ")]
    assert "'Qwen/Qwen2.5-1.5B-Instruct'" in first and "its shape is unknown, so there are no estimates" in first
    assert second.startswith("note: task 'gsm8k': its data set is not on this machine")
    assert "learner.groups_per_step" in result.stdout and "GiB" not in result.stdout


def test_check_estimates_from_the_hubs_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--Qwen--Qwen2.5-1.5B-Instruct"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(QWEN))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    result = headrace("check", GSM8K, "--set", "task.name=arithmetic", **caches(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert "estimates, for 1,543,714,304 parameters" in result.stdout
    assert "28,672 bytes each" in result.stdout
    assert "note: the prompts were not tried: model 'Qwen/Qwen2.5-1.5B-Instruct' has no " in result.stdout


def test_check_for_programs_says_the_same() -> None:
    overrides = ["--set", "learner.steps=3", "--set", "redis_url=redis://:secret@127.0.0.1:1"]
    result = headrace("check", TINY, "--json", *overrides)
    assert (result.returncode, result.stderr) == (0, "") and "secret" not in result.stdout
    found = json.loads(result.stdout)
    assert found["settings"]["learner.steps"] == {"value": 3, "source": "--set learner.steps=3"}
    assert set(found["settings"]) == set(settings_of(load_recipe(ROOT / TINY).config))
    titles = {"learner", "engine", "host", "disk", "moved", "time"}
    assert found["estimates"]["parameters"] == 656_448 and set(found["estimates"]) >= titles
    assert found["prompts"]["train"] == {"tried": 100, "refused": [], "tokens": [18, 23, 27]}
    assert found["template"]["after_user"] == "kept" and found["template"]["after_tool"] == "not rendered"
    assert found["notes"][0].startswith("redis_url ")


def test_dead_tickets_for_programs(redis_url: str, client: redis.Redis, keys: Keys) -> None:
    entry_id = client.xadd(keys.dead_letters, {"id": "0-7", "reason": "no answer"}).decode()
    client.hset(keys.ledger, "0-7", f"dead {entry_id}")
    where = ["--run", keys.run, "--json", "--redis-url", redis_url]
    (dead,) = json.loads(headrace("dead-letters", "list", *where).stdout)["dead"]
    assert (dead["ticket_id"], dead["reason"], dead["is_ticket"]) == ("0-7", "no answer", True)
    assert json.loads(headrace("dead-letters", "retry", *where).stdout) == {"tickets": ["0-7"]}
    assert json.loads(headrace("dead-letters", "purge", *where).stdout) == {"tickets": ["0-7"]}


def test_a_dead_ticket_shows_its_prompt_and_what_could_not_be_scored(
    redis_url: str, client: redis.Redis, keys: Keys
) -> None:
    """Also where the learner refused the group; and nothing that a terminal would obey."""
    payloads: dict[str, dict[str, Any]] = {
        "0-7": {"payload": encode(make_ticket("0-7")), "completions": json.dumps(["so \x1b[2J it is 3"])},
        "0-8": {"payload": encode(make_group("0-8"))},
        "0-9": {"payload": b"\xff"},
    }
    for name, fields in payloads.items():
        entry: Any = {"id": name, "reason": f"why {name}", **fields}
        client.hset(keys.ledger, name, f"dead {client.xadd(keys.dead_letters, entry).decode()}")
    where = ["--run", keys.run, "--redis-url", redis_url]
    shown = headrace("dead-letters", "list", "0-7", *where).stdout
    assert "0-7  why 0-7\n  user:\n    1 + 1?\n  reference:\n" in shown and "why 0-8" not in shown
    assert shown.endswith("  completion 1:\n    so \N{REPLACEMENT CHARACTER}[2J it is 3\n")
    both = json.loads(headrace("dead-letters", "list", "0-8", "0-9", "--json", *where).stdout)["dead"]
    assert [one["completions"] for one in both] == [["2", "2"], []]
    assert (both[0]["reference"], both[0]["messages"]) == ({"answer": "2"}, make_ticket().messages)
    assert headrace("dead-letters", "list", *where).stdout.count("why 0-") == 3
    unknown = headrace("dead-letters", "list", "1-1", *where)
    assert unknown.returncode == 2 and unknown.stderr.startswith("headrace dead-letters: ticket '1-1' is not dead")


TASK_BESIDE = """
from headrace.common.tasks import Prompt

class Count:
    def prompts(self, split, *, seed, epoch):
        yield Prompt(messages=[{"role": "user", "content": f"count to 3, {split}"}], reference={"to": 3})

    def reward(self, completion, ticket):
        return float("3" in completion)
"""


def test_a_task_beside_the_recipe_is_found_wherever_the_command_is_given(tmp_path: Path, demo_policy: Path) -> None:
    """By the command, by what tries the prompts, and by a reward worker."""
    (tmp_path / "counting_beside.py").write_text(TASK_BESIDE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {demo_policy}, dtype: float32}}\ntask: {{name: 'counting_beside:Count'}}\n"
        "sampling: {max_new_tokens: 8}\ngeneration: {engine: {device: cpu}}\n"
    )
    result = headrace("check", str(recipe))
    assert result.returncode == 0, result
    assert "counting_beside:Count" in result.stdout
    elsewhere = tmp_path / "elsewhere" / "recipe.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(recipe.read_text())
    refused(headrace("check", str(elsewhere)), "expected a module beside the recipe, installed, or on PYTHONPATH")
