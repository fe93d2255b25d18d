"""What can be known to be wrong before anything starts, read from files without torch or transformers.

Every check raises `ValueError` with one line that names the value and what was expected.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.config import RunConfig
from common.tasks import Task, load_task


def check_run(config: RunConfig) -> None:
    """The model's folder, the task and its data, and the engine's installation."""
    check_model_folder(config.model.path)
    check_task(config)
    if config.generation.engine.url is None:
        check_engine_installed()


def check_task(config: RunConfig) -> Task:
    """Loads the task and looks at the first prompt of each split."""
    task = load_task(config.task.name, config.task.settings)
    for split in ("train", "held_out"):
        if next(task.prompts(split, seed=config.seed, epoch=0), None) is None:
            raise ValueError(f"task {config.task.name!r} has no {split} prompts")
    return task


def check_engine_installed() -> None:
    if importlib.util.find_spec("sglang") is None:
        raise ValueError("SGLang is not installed here; expected `make setup`, or generation.engine.url of a server")


def check_model_folder(path: str) -> None:
    """A chat template, and no token without a row. A hub name is checked by the learner, once it is downloaded."""
    folder = Path(path)
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "/")) and not folder.parent.exists():
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path {path!r}: expected a folder with a config.json, or a hub name")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"model.path {path!r}: expected a tokenizer.json")
    in_config = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if not in_config and not (folder / "chat_template.jinja").is_file():
        raise ValueError(f"model.path {path!r} has no chat template; expected an instruction-tuned model")
    num_rows = _read_json(folder / "config.json").get("vocab_size")
    num_tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(with_added_tokens=True)
    if num_rows is not None:
        check_vocabulary(path, num_tokens, num_rows)


def check_vocabulary(path: str, num_tokens: int, num_rows: int) -> None:
    """The tokenizer may not produce an id that the model has no row for."""
    if num_tokens > num_rows:
        raise ValueError(f"model.path {path!r}: its tokenizer has {num_tokens} tokens, but the model only {num_rows} rows")


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content
