"""Logging of a service: one line an event, to stderr, in a form that people and programs read.

    2026-11-23T01:02:03.456Z INFO learner run=demo step=12 ticket=0-17: message

A field is said by the process (`set_up_logging`, `from_now_on`), by the work at hand (`about`) or by the call
(`extra`); the nearest counts. Further lines of an event are indented and control characters written out, so that no
text can forge a line. Passwords in URLs are left out, and whatever was named to `keep_out`.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from headrace.common.process.redaction import without_password

FIELDS = ("run", "step", "replica", "version", "ticket", "tickets")
"""In this order; `tickets` are many, separated by commas."""
MAX_MESSAGE_CHARS = 8000
"""Tracebacks included; of a longer one begin and end are kept."""
Field = str | int | Sequence[str] | Callable[[], str | int]

_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<level>[A-Z]+) (?P<service>[^\s:]+)"
    rf"(?P<fields>(?: (?:{'|'.join(FIELDS)})=\S+?)*): (?P<message>.*)"
)
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))} | {0x2028: " "}
_work: ContextVar[Mapping[str, Field]] = ContextVar("work", default=MappingProxyType({}))


class Line(NamedTuple):
    """One event of a log."""

    at: float
    """Unix time."""
    level: str
    service: str
    fields: dict[str, str]
    message: str
    """Of one or more lines."""


@contextmanager
def about(**fields: Field) -> Iterator[None]:
    """What this task or thread logs meanwhile carries these fields."""
    token = _work.set({**_work.get(), **fields})
    try:
        yield
    finally:
        _work.reset(token)


class LineFormatter(logging.Formatter):
    """Of one process. `fields` and `secrets` may grow while it runs."""

    def __init__(self, service: str, **fields: Field) -> None:
        super().__init__()
        self.service = service
        self.fields = fields
        self.secrets: set[str] = set()

    def format(self, record: logging.LogRecord) -> str:
        fields = {**self.fields, **_work.get(), **{name: vars(record)[name] for name in FIELDS if name in vars(record)}}
        told = "".join(f" {name}={_shown(fields[name])}" for name in FIELDS if name in fields)
        text = record.getMessage()
        if record.name.partition(".")[0] not in ("headrace", "root"):
            text = f"{record.name}: {text}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        head = f"{_stamp(record.created)} {record.levelname} {self.service}{told}"
        return f"{head}: {_bounded(self._discreet(text))}".translate(_CONTROL).replace("\n", "\n  ")

    def _discreet(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "...")
        return without_password(text)


def set_up_logging(service: str, **fields: Field) -> None:
    """Of the whole process. A field may be a function that says it."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(LineFormatter(service, **fields))
    logging.basicConfig(level=logging.INFO, handlers=[stderr])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.captureWarnings(True)


@contextmanager
def logging_to(path: Path, service: str, **fields: Field) -> Iterator[None]:
    """While the block runs, what this process logs goes to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(LineFormatter(service, **fields))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(file)
    root.setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(file)
        root.setLevel(level)
        file.close()


def from_now_on(**fields: Field) -> None:
    """Every line of the process carries these fields as well."""
    for formatter in _formatters():
        formatter.fields |= fields


def keep_out(secret: str) -> None:
    """From now on no line has it."""
    for formatter in _formatters():
        formatter.secrets |= {secret} - {""}


def _formatters() -> list[LineFormatter]:
    found = [handler.formatter for handler in logging.getLogger().handlers]
    return [formatter for formatter in found if isinstance(formatter, LineFormatter)]


def parse_line(line: str) -> Line | None:
    """None of what is no event's first line."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    fields = dict(pair.split("=", 1) for pair in found["fields"].split())
    at = datetime.fromisoformat(found["time"]).timestamp()
    return Line(at, found["level"], found["service"], fields, found["message"])


def shown_line(line: Line) -> str:
    """As it stands in a log."""
    told = "".join(f" {name}={value}" for name, value in line.fields.items())
    return f"{_stamp(line.at)} {line.level} {line.service}{told}: {line.message}".replace("\n", "\n  ")


def as_json(line: Line) -> dict[str, Any]:
    """For programs: the fields beside the rest, `tickets` as a list."""
    fields: dict[str, Any] = dict(line.fields)
    if "tickets" in fields:
        fields["tickets"] = fields["tickets"].split(",")
    if str(fields.get("step", "")).isdecimal():
        fields["step"] = int(fields["step"])
    return {"time": _stamp(line.at), "level": line.level, "service": line.service, **fields, "message": line.message}


def _stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(at * 1000) % 1000:03d}Z"


def _shown(field: Field) -> str:
    value = field() if callable(field) else field
    text = str(value) if isinstance(value, str | int) else ",".join(value)
    return re.sub(r"[\s,]" if isinstance(value, str) else r"\s", "_", text) or "-"


def _bounded(text: str) -> str:
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    half = MAX_MESSAGE_CHARS // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
