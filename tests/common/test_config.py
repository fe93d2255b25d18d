"""Recipes: they load, they are refused in one clear line, their presets fill in, and the shipped ones stay short."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from headrace.common.config import ActorConfig, ConfigError, RunConfig, load_recipe, yaml_text
from headrace.common.config.actor import PRESETS
from headrace.launcher.run.run_folder import write_config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
TINY = CONFIGS / "tiny-cpu.yaml"
GSM8K = CONFIGS / "gsm8k-qwen2.5-1.5b.yaml"
SMALLEST: dict[str, Any] = {"model": {"path": "m"}, "task": {"name": "arithmetic"}}


def recipe_file(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml_text.dump(SMALLEST | sections))
    return path


def leaves(given: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in given.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def without(given: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    shorter = copy.deepcopy(given)
    section = shorter
    for key in path[:-1]:
        section = section[key]
    del section[path[-1]]
    return shorter


def repeated_defaults(given: dict[str, Any]) -> list[str]:
    """The keys without which the configuration would be the same."""
    complete = RunConfig.model_validate(given)
    repeated = []
    for path in leaves(given):
        try:
            if RunConfig.model_validate(without(given, path)) == complete:
                repeated.append(".".join(path))
        except ValidationError:  # it is needed
            continue
    return repeated


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_repeats_no_default(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    assert load_recipe(path).config.model.path
    assert repeated_defaults(given) == []


def test_a_repeated_default_is_seen_also_where_a_preset_gives_it() -> None:
    assert repeated_defaults(SMALLEST | {"learner": {"max_staleness": 2, "steps": 5}}) == ["learner.max_staleness"]
    assert repeated_defaults(SMALLEST | {"actor": {"preset": "baseline", "eps_clip": 0.4}}) == ["actor.eps_clip"]


def test_a_mean_staleness_that_comes_out_even_loses_no_group_to_rounding() -> None:
    given = SMALLEST | {"learner": {"groups_per_step": 100, "max_mean_staleness": 0.15}}
    assert RunConfig.model_validate(given).learner.max_outstanding_groups == 115


def test_the_gsm8k_recipe_is_the_seeds() -> None:
    config = load_recipe(GSM8K).config
    actor, learner, optimizer = config.actor, config.learner, config.optimizer
    assert (config.model.path, config.model.dtype) == ("Qwen/Qwen2.5-1.5B-Instruct", "bfloat16")
    assert config.task.name == "gsm8k"
    assert (config.sampling.max_new_tokens, config.sampling.temperature) == (1024, 1.0)
    assert (learner.groups_per_step, actor.group_size, learner.max_staleness) == (256, 4, 2)
    assert (learner.micro_batch_tokens, actor.num_mini_batches) == (10_240, 1)
    assert (optimizer.lr, optimizer.lr_schedule, optimizer.warmup_fraction) == (1.7e-5, "constant", 0.001)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.017, 1.0)
    assert (actor.eps_clip, actor.clip_range, actor.dual_clip) == (0.4, (0.6, 1.4), None)
    assert (actor.use_decoupled_loss, actor.behav_imp_weight_mode, actor.behav_imp_weight_cap) == (
        True,
        "token_mask",
        5,
    )
    assert (actor.reward_bias, actor.reward_scaling) == (-0.5, 10.0)
    assert (actor.advantage_mean, actor.advantage_std, actor.batch_advantage_norm) == ("group", "group", True)
    assert (actor.kl_coef, actor.dynamic_sampling) == (0.0, True)
    assert (actor.loss_aggregation, actor.importance_sampling_level) == ("token_mean", "sequence")
    assert not actor.behaviour_clip, "the baseline loss has none"


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"learner": {"group_per_step": 4}},
            "learner.group_per_step is not a setting; did you mean learner.groups_per_step?",
        ),
        ({"learner": {"lr": 1.0}}, "learner.lr is not a setting; did you mean optimizer.lr?"),
        ({"lerner": {"steps": 1}}, "lerner is not a setting; did you mean learner?"),
        ({"generation": {"engine": {"devise": "cpu"}}}, "did you mean generation.engine.device?"),
        ({"sampling": {"zzz": 1}}, "sampling.zzz is not a setting; expected one of temperature, max_new_tokens"),
        (
            {"sampling": {"min_new_tokens": 4}},
            "sampling.min_new_tokens is not offered: it masks the end tokens, so that",
        ),
        (
            {"sampling": {"top_p": 0.9}},
            "sampling.top_p is not offered: the engine would sample from another distribution",
        ),
        ({"sampling": {"stop": [""]}}, "sampling.stop.0 is '': string should have at least 1 character"),
        ({"sampling": {"stop": ["x"] * 33}}, "list should have at most 32 items"),
        ({"sampling": {"stop": "###"}}, "sampling.stop is '###': input should be a valid list"),
        ({"task": {}}, "task.name is missing"),
        ({"learner": {"steps": 0}}, "learner.steps is 0: input should be greater than or equal to 1"),
        ({"learner": {"steps": "many"}}, "learner.steps is 'many': expected a number, got text"),
        ({"learner": {"steps": "5"}}, "learner.steps is '5': expected a number, got text"),
        ({"learner": {"steps": True}}, "learner.steps is True: expected a number, got true or false"),
        ({"learner": {"max_mean_staleness": True}}, "learner.max_mean_staleness is True: expected a number"),
        ({"optimizer": {"lr": "1e-6"}}, "optimizer.lr is '1e-6': expected a number, got text"),
        ({"learner": {"steps": 1.5}}, "learner.steps is 1.5: input should be a valid integer"),
        ({"task": {"name": "gsm8k", "path": "x"}}, "task.path is not a setting; did you mean task.settings.path, an"),
        ({"task": {"name": "gsm8k", "nam": "x"}}, "task.nam is not a setting; did you mean task.name?"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr is nan: input should be a finite number"),
        (
            {"optimizer": {"warmup_steps": 5, "warmup_fraction": 0.1}},
            "warmup_fraction 0.1 and warmup_steps 5 are both given: expected one of them",
        ),
        (
            {"optimizer": {"warmup_steps": 5}, "learner": {"steps": 5}},
            "optimizer.warmup_steps 5 is not less than learner.steps 5",
        ),
        ({"optimizer": {"lr_schedule": "cos"}}, "optimizer.lr_schedule is 'cos'"),
        ({"actor": {"truncated": "drop"}}, "actor.truncated is 'drop'"),
        ({"learner": None}, "learner is None: input should be a valid dictionary"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(tmp_path: Path, sections: dict[str, Any], line: str) -> None:
    path = recipe_file(tmp_path, **sections)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"actor": {"group_size": 1, "dynamic_sampling": False}}, "group_size 1 has no group mean"),
        ({"actor": {"group_size": 1, "dynamic_sampling": False, "advantage_mean": "batch"}}, "group mean or deviation"),
        (
            {"actor": {"group_size": 1, "advantage_mean": "leave_one_out", "advantage_std": "none"}},
            "group_size 1 leaves no other completion",
        ),
        (
            {"actor": {"group_size": 1, "advantage_mean": "batch", "advantage_std": "batch"}},
            "group_size 1 makes every group uniform",
        ),
        (
            {"actor": {"num_mini_batches": 5}, "learner": {"groups_per_step": 4}},
            "actor.num_mini_batches 5 is more than learner.groups_per_step 4",
        ),
        (
            {"sampling": {"max_new_tokens": 513}, "learner": {"micro_batch_tokens": 512}},
            "sampling.max_new_tokens 513 does not fit learner.micro_batch_tokens 512",
        ),
        ({"actor": {"overlong_tokens": 1025}}, "actor.overlong_tokens 1025 is more than sampling.max_new_tokens 1024"),
        ({"actor": {"group_size": 257}}, "a group of 257 completions does not fit"),
        ({"evaluation": {"completions_per_prompt": 257}}, "a group of 257 completions does not fit"),
        (
            {"generation": {"autoscale": True, "replicas": 9}},
            "generation.replicas 9 is more than generation.max_replicas 8",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(tmp_path: Path, sections: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file(tmp_path, **sections))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_limits_themselves_are_accepted(tmp_path: Path) -> None:
    sections = {
        "actor": {"num_mini_batches": 4, "overlong_tokens": 512, "group_size": 256},
        "sampling": {"max_new_tokens": 512},
        "learner": {"groups_per_step": 4, "micro_batch_tokens": 512},
    }
    assert load_recipe(recipe_file(tmp_path, **sections)).config.actor.num_mini_batches == 4


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file(tmp_path, learner={"stepz": 1}, optimizer={"lr": -1}))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a\n- b\n", "expected sections"),
        ("model: {", "not YAML"),
        (None, "cannot be read"),
        ("seed: 1\nmodel:\n  path: a\n  dtype: float32\n  path: b\n", "line 5: 'path' is given again, first in line 3"),
        ("seed: 1\n'seed': 2\n", "line 2: 'seed' is given again, first in line 1"),
        ("seed: 1\nlearner: {steps: 0100}\n", "line 2: 0100 has a leading zero"),
        ("task:\n  settings:\n    level: 007\n", "line 3: 007 has a leading zero"),
        (f"seed: {'9' * 5000}\n", "line 1: '9+' is no integer"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_recipe(path)


@pytest.mark.parametrize("word", ["yes", "on", "true", "True", "off", '"5"', "'1e-3'", "12:30", "2026-11-30"])
def test_a_word_is_no_number_wherever_it_is_given(tmp_path: Path, word: str) -> None:
    path = recipe_file(tmp_path)
    for name in ("learner.steps", "optimizer.lr", "generation.engine.memory_fraction"):
        with pytest.raises(ConfigError, match=f"{name} is .*: expected a number"):
            load_recipe(path, [f"{name}={word}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'1e-6'", "1e-6"),
        ('"0100"', "0100"),
        ("'5'", "5"),
        ("yes", "yes"),
        ("'true'", "true"),
        ("12:30", "12:30"),
        ("2026-11-30", "2026-11-30"),
        ("1e-6", 1e-6),
        ("5", 5),
        ("-0.5", -0.5),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("[1e-6, '1e-6', {a: 'on'}]", [1e-6, "1e-6", {"a": "on"}]),
    ],
)
def test_a_tasks_settings_are_what_was_written_also_after_the_runs_folder(
    tmp_path: Path, text: str, value: Any
) -> None:
    path = tmp_path / "written.yaml"
    path.write_text(f"model: {{path: m}}\ntask:\n  name: arithmetic\n  settings:\n    given: {text}\n")
    overridden = load_recipe(recipe_file(tmp_path), [f"task.settings.given={text}"])
    for recipe in (load_recipe(path), overridden):
        assert recipe.config.task.settings == {"given": value}
        assert type(recipe.config.task.settings["given"]) is type(value)
        written = load_recipe(write_config(tmp_path, recipe))
        assert written.config == recipe.config
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["task"]["settings"] == {"given": value}


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=20)
        | st.from_regex(r"[-+.0-9_eExoXinfNaybtrulsTF:~]{1,8}", fullmatch=True),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_is_read_as_the_same(value: Any) -> None:
    text = yaml_text.dump({"value": value})
    assert yaml_text.load(text) == {"value": value}
    assert repr(yaml_text.load(text)) == repr({"value": value})


def test_a_mapping_merged_into_another_may_be_overridden() -> None:
    assert yaml_text.load("base: &b {x: 1, y: 2}\nc: {<<: *b, x: 3}")["c"] == {"x": 3, "y": 2}


def test_an_override_wins_and_every_value_names_its_source() -> None:
    recipe = load_recipe(TINY, ["learner.steps=3", "optimizer.lr=1e-6", "actor.preset=token", "seed=7"])
    assert (recipe.config.learner.steps, recipe.config.optimizer.lr, recipe.config.seed) == (3, 1e-6, 7)
    assert recipe.sources["learner.steps"] == "--set learner.steps=3"
    assert recipe.sources["seed"] == "--set seed=7"
    assert recipe.sources["learner.groups_per_step"] == str(TINY)
    assert recipe.sources["actor.importance_sampling_level"] == "preset token"
    assert recipe.sources["learner.host"] == "default"
    given = load_recipe(TINY, ["actor.preset=baseline", "actor.eps_clip=0.1"])
    assert given.sources["actor.eps_clip"] == "--set actor.eps_clip=0.1", "not the preset"


def test_sources_are_exactly_the_settings() -> None:
    recipe = load_recipe(TINY)
    assert set(recipe.sources) == {".".join(path) for path in leaves(recipe.config.model_dump())}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("learner.steps", "expected section.key=value"),
        ("learner.steps={", "the value is not YAML"),
        ("seed.deep=1", "seed is not a section|seed is"),
        ("learner.stepz=1", "did you mean learner.steps"),
    ],
)
def test_a_wrong_override_is_refused(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load_recipe(TINY, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_and_what_is_given_wins(name: str) -> None:
    filled = ActorConfig.model_validate({"preset": name})
    for key, value in PRESETS[name].items():
        assert getattr(filled, key) == value
    plain = ActorConfig.model_validate({})
    untouched = set(ActorConfig.model_fields) - set(PRESETS[name]) - {"preset"}
    assert all(getattr(filled, key) == getattr(plain, key) for key in untouched)
    for level in ("token", "sequence"):
        given = ActorConfig.model_validate({"preset": name, "importance_sampling_level": level, "eps_clip": 0.05})
        assert (given.importance_sampling_level, given.eps_clip) == (level, 0.05)


def test_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"actor\.preset is 'sead'"):
        load_recipe(recipe_file(tmp_path, actor={"preset": "sead"}))


@pytest.mark.parametrize(("num_samples", "slots"), [(1, 512), (2, 256), (16, 32), (32, 16), (600, 1)])
def test_evaluation_slots_count_completions(tmp_path: Path, num_samples: int, slots: int) -> None:
    """A benchmark's 1,319 prompts of one completion each would else leave a GPU idle, 32 at a time."""
    sections = {"actor": {"group_size": 16}, "evaluation": {"completions_per_prompt": num_samples}}
    engine = {"engine": {"max_running_requests": 1024}}
    config = load_recipe(recipe_file(tmp_path, **sections, generation=engine)).config
    assert config.num_eval_slots == slots
