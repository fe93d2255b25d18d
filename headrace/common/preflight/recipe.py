"""Checks of a recipe before anything starts, from files, without torch or transformers.

Every check raises `ValueError` with one line that names the value and what was expected: as its subclass
`UnavailableHere` if the configuration may be right and only this machine cannot run it now. The small files of a model
on the hub are downloaded; if the hub cannot be reached, they are read from its local cache.
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from headrace.common.config import ModelConfig, RunConfig
from headrace.common.http.addresses import listen
from headrace.common.models.hub import download, is_hub_name
from headrace.common.models.tokenizer import read_chat_template
from headrace.common.preflight.installation import INSTALL_COMMANDS, is_installed
from headrace.common.process.redaction import redact_url_passwords

HUB_TASKS = {"gsm8k"}
"""The built-in tasks whose prompts may come from the hub."""
HUB_TIMEOUT_S = 3.0
REDIS_TIMEOUT_S = 3.0


class UnavailableHere(ValueError):
    """Something is missing on this machine, busy or unreachable; the configuration may run on another machine."""


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]


class _AddedToken(msgspec.Struct):
    id: int


class _TokenizerFile(msgspec.Struct):
    model: _Vocabulary
    added_tokens: list[_AddedToken] = []

    @property
    def num_rows(self) -> int:
        """One above the highest token id."""
        vocab = self.model.vocab
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return 1 + max([*ids, *(token.id for token in self.added_tokens)], default=-1)


def check_run(config: RunConfig, missing: list[str] | None = None) -> None:
    """Raises the first problem. With `missing`, an `UnavailableHere` is appended to it instead of raised.

    `headrace.common.preflight.task` checks the task and its prompts.
    """
    prepare_hub(config)
    for check in (check_addresses, check_redis, check_model, check_engine, check_trackers):
        try:
            check(config)
        except UnavailableHere as problem:
            if missing is None:
                raise
            missing.append(str(problem))


def prepare_hub(config: RunConfig) -> None:
    """Switches the hub's libraries to their caches if the hub cannot be reached; they would retry for half a minute.

    Sets variables of this process and its children; call it before the libraries are imported.
    """
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # errors are also raised
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not (is_hub_name(config.model.path) or config.task.name in HUB_TASKS) or "HF_HUB_OFFLINE" in os.environ:
        return
    import httpx

    try:
        httpx.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=HUB_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL):
        os.environ["HF_HUB_OFFLINE"] = "1"


def check_addresses(config: RunConfig) -> None:
    """Checks the configured ports: they differ, and are free."""
    learner, generation = config.learner, config.generation
    if generation.port and generation.replicas > 1:
        raise ValueError(
            f"generation.port {generation.port} is one port for {generation.replicas} replicas; expected 0"
        )
    if learner.port and (learner.host, learner.port) == (generation.host, generation.port):
        raise ValueError(f"learner.port and generation.port are both {learner.port}, expected two ports")
    for name, section in (("learner", learner), ("generation", generation)):
        if section.port:
            try:
                listen(section.host, section.port).close()
            except ValueError as error:
                raise UnavailableHere(f"{name}.port {section.port}: {error}") from error


def check_redis(config: RunConfig) -> None:
    """Checks that a configured Redis answers; the learner checks its durability."""
    if config.redis_url is None:
        return
    import redis

    from headrace.common.redis.address import make_client

    address = redact_url_passwords(config.redis_url)
    try:
        client = make_client(config.redis_url, socket_connect_timeout=REDIS_TIMEOUT_S, socket_timeout=REDIS_TIMEOUT_S)
        client.ping()
        client.close()
    except redis.RedisError as error:
        raise UnavailableHere(f"redis_url {address!r} does not answer: {one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"redis_url {address!r}: {one_line(error)}") from error


def check_engine(config: RunConfig) -> None:
    if config.generation.engine.url is None:
        check_engine_installed()


def check_engine_installed() -> None:
    if not is_installed("sglang"):
        raise UnavailableHere(
            f"SGLang is not installed here; expected generation.engine.url of a server, or, {INSTALL_COMMANDS}"
        )


def check_trackers(config: RunConfig) -> None:
    for name in config.trackers:
        if not is_installed(name):
            raise UnavailableHere(
                f"trackers: {name} is not installed here; expected `pip install {name}`, or no such tracker"
            )


def check_model(config: RunConfig) -> None:
    model = config.model
    if model.chat_template is not None:
        read_chat_template(model.chat_template)
    check_model_folder(model.location, model.revision, has_template=model.chat_template is not None)


def check_model_folder(path: str, revision: str | None = None, has_template: bool = False) -> None:
    """Checks that there is a chat template, and an embedding row for every token; for a model on the hub, as far as its
    files are here. `has_template`: a template is configured besides the model's."""
    folder = model_files(path, revision)
    is_partial = is_hub_name(path)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    if not has_tokenizer and not is_partial:
        raise ValueError(f"model.path {path!r}: expected a tokenizer.json")
    if (folder / "tokenizer_config.json").is_file() or not is_partial:
        in_config = read_model_file(path, folder / "tokenizer_config.json").get("chat_template")
        if not in_config and not (folder / "chat_template.jinja").is_file() and not has_template:
            raise ValueError(
                f"model.path {path!r} has no chat template; expected an instruction-tuned model, or a file of one as "
                "model.chat_template"
            )
    num_rows = read_model_file(path, folder / "config.json").get("vocab_size")
    if has_tokenizer and num_rows is not None:
        tokenizer = _decode(path, folder / "tokenizer.json", _TokenizerFile)
        check_vocabulary(path, tokenizer.num_rows, num_rows)


def check_vocabulary(path: str, num_tokens: int, num_rows: int) -> None:
    """Checks that the model has an embedding row for every id that the tokenizer can produce."""
    if num_tokens > num_rows:
        raise ValueError(
            f"model.path {path!r}: its tokenizer has {num_tokens} tokens, but the model has {num_rows} rows"
        )


def model_files(path: str, revision: str | None = None) -> Path:
    """The folder with the model's config.json: `path` itself, or the hub's cache on this machine."""
    if not is_hub_name(path):
        if revision is not None:
            raise ValueError(
                f"model.revision {revision!r}: model.path {path!r} is not a model on the hub; expected no revision"
            )
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"model.path {path!r}: expected a folder with a config.json, or a hub name")
        return Path(path)
    import httpx
    from huggingface_hub import errors

    try:
        folder = download(ModelConfig(path=path, revision=revision), has_weights=False)
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"model.revision {revision!r}: {path!r} has no such branch, tag or commit") from error
    except errors.GatedRepoError as error:
        raise ValueError(f"model.path {path!r}: the hub requires authorisation for it; expected HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"model.path {path!r}: neither a folder here nor a model that is visible on the hub"
        ) from error
    except (OSError, errors.HfHubHTTPError, httpx.HTTPError) as error:
        where = (
            "not a folder here; as a model on the hub, its files are not on this machine, and the hub is unreachable"
        )
        raise UnavailableHere(f"model.path {path!r}: {where}") from error
    if not (folder / "config.json").is_file():
        raise UnavailableHere(f"model.path {path!r}: the hub's cache on this machine has no config.json for it")
    return folder


def read_model_file(path: str, file: Path) -> dict[str, Any]:
    """The content of a JSON file of the model at `path`; empty if there is no such file."""
    content: dict[str, Any] = _decode(path, file, dict) if file.is_file() else {}
    return content


def _decode(path: str, file: Path, expected: type) -> Any:
    try:
        return msgspec.json.decode(file.read_bytes(), type=expected)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"model.path {path!r}: {file.name} cannot be read: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
