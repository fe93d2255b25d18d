"""`headrace try`: makes the tickets, has them played, and prints each rollout once all before it are printed."""

import contextlib
from collections.abc import Iterator, Sequence

import msgspec
from rich.console import Console
from rich.text import Text

from headrace.common.config import RunConfig
from headrace.common.preflight.installation import check_installed
from headrace.common.preflight.recipe import check_engine, check_model, prepare_hub
from headrace.common.process.redaction import redact_url_passwords
from headrace.common.tasks import Split
from headrace.common.wire.trial_report import Failed, RolloutReport, TrialRequest
from headrace.launcher.check.trial import child
from headrace.launcher.run.errors import ControlFailed
from headrace.launcher.terminal.render import number
from headrace.launcher.trial.endpoint import Endpoint, find_endpoint
from headrace.launcher.trial.player import playing
from headrace.launcher.trial.rollout_text import count, rollout_text
from headrace.launcher.trial.tickets import FirstTickets

NO_TOKENS = "An endpoint gives no tokens, so nothing could be recorded: segments and token counts are not known."


def try_recipe(config: RunConfig, console: Console, split: Split, num: int, url: str | None, model: str | None) -> bool:
    """Whether every rollout has a reward. Raises `ValueError`, or `ControlFailed` if nothing could be played."""
    if model is not None and url is None:
        raise ValueError(f"--model {model!r}: expected --url too; without it the recipe's model.path is tried")
    endpoint = None if url is None else find_endpoint(url, model)
    prepare_hub(config)
    if endpoint is None:
        check_installed()
        check_engine(config)
        check_model(config)
    found = _first_tickets(config, split, num, endpoint)
    for reason in found.refused:
        console.print(Text(f"note: {reason}"), soft_wrap=True)
    request = TrialRequest(
        config.model_copy(update={"redis_url": None}).model_dump_json(),
        found.tickets,
        found.has_rollout,
        *(endpoint or ()),
    )
    kind = "episode" if found.has_rollout else "completion"
    console.print(_title(config, kind, split, len(found.tickets), endpoint), soft_wrap=True)
    reports: list[RolloutReport] = []
    for report in _reports(request, console, _awaited(config, endpoint)):
        reports.append(report)
        console.print(rollout_text(len(reports), report), soft_wrap=True)
    console.print(_summary(kind, reports), soft_wrap=True)
    if endpoint is not None:
        console.print(Text(NO_TOKENS, "dim"), soft_wrap=True)
    return all(report.reward is not None for report in reports)


def _first_tickets(config: RunConfig, split: Split, num: int, endpoint: Endpoint | None) -> FirstTickets:
    module, plain = "headrace.launcher.trial.tickets", config.model_copy(update={"redis_url": None}).model_dump_json()
    with child(module, plain, split, str(num), str(endpoint is not None)) as made:
        found = msgspec.msgpack.decode(made.answer(config.task.name), type=FirstTickets)
    if found.problem:
        raise ValueError(found.problem)
    return found


def _reports(request: TrialRequest, console: Console, awaited: str) -> Iterator[RolloutReport]:
    """While nothing has been printed, a terminal shows what is awaited."""
    with contextlib.ExitStack() as waiting, playing(request) as events:
        waiting.enter_context(console.status(Text(awaited)))
        for event in events:
            if isinstance(event, Failed):
                raise (ValueError if event.is_refusal else ControlFailed)(event.problem)
            if isinstance(event, RolloutReport):
                waiting.close()
                yield event


def _title(config: RunConfig, kind: str, split: Split, num: int, endpoint: Endpoint | None) -> Text:
    who = config.model.path if endpoint is None else f"{endpoint.model} at {redact_url_passwords(endpoint.base_url)}"
    return Text.assemble((f"{config.task.name}: {count(num, kind)}", "bold"), f" of split {split}, played by {who}")


def _awaited(config: RunConfig, endpoint: Endpoint | None) -> str:
    is_started = endpoint is None and config.generation.engine.url is None
    return "SGLang starts, then the first rollout …" if is_started else "the first rollout …"


def _summary(kind: str, reports: Sequence[RolloutReport]) -> Text:
    rewards = [report.reward for report in reports if report.reward is not None]
    text = Text(f"{count(len(reports), kind)}: ", "bold")
    if rewards:
        mean = sum(rewards) / len(rewards)
        text.append(f"reward {number(mean, 3)} in the mean, {number(min(rewards))} to {number(max(rewards))}")
    if num_failed := len(reports) - len(rewards):
        text.append(f"{', ' * bool(rewards)}{num_failed} failed", "red")
    return text
