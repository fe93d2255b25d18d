"""Logging of a service: one event per line on stderr, in a form that people and programs can read.

    2026-11-23T01:02:03.456Z INFO learner run=demo step=12 ticket=0-17: message

A field is set for the process (`set_up_logging`, `add_process_fields`), for the work at hand (`log_context`) or for one
call (`extra`); the most specific one applies. Further lines of an event are indented and control characters escaped, so
that no text can forge a line. Passwords in URLs and every text given to `redact` are left out.
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

from headrace.common.process.redaction import redact_url_passwords

FIELDS = ("run", "step", "replica", "version", "ticket", "tickets")
"""In the order of a line; `tickets` holds several, separated by commas."""
MAX_MESSAGE_CHARS = 8000
"""Includes the traceback; of a longer message the beginning and the end are kept."""
Field = str | int | Sequence[str] | Callable[[], str | int]

_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<level>[A-Z]+) (?P<service>[^\s:]+)"
    rf"(?P<fields>(?: (?:{'|'.join(FIELDS)})=\S+?)*): (?P<message>.*)"
)
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))} | {0x2028: " "}
_work: ContextVar[Mapping[str, Field]] = ContextVar("work", default=MappingProxyType({}))


class LogLine(NamedTuple):
    """One event of a log, with its further lines."""

    at: float
    """Unix time."""
    level: str
    service: str
    fields: dict[str, str]
    message: str
    """One or more lines."""


@contextmanager
def log_context(**fields: Field) -> Iterator[None]:
    """Adds the fields to everything that this task or thread logs inside the block."""
    token = _work.set({**_work.get(), **fields})
    try:
        yield
    finally:
        _work.reset(token)


class LineFormatter(logging.Formatter):
    """The formatter of one process; `fields` and `secrets` may grow while it runs."""

    def __init__(self, service: str, **fields: Field) -> None:
        super().__init__()
        self.service = service
        self.fields = fields
        self.secrets: set[str] = set()

    def format(self, record: logging.LogRecord) -> str:
        fields = {**self.fields, **_work.get(), **{name: vars(record)[name] for name in FIELDS if name in vars(record)}}
        shown = "".join(f" {name}={_field_text(fields[name])}" for name in FIELDS if name in fields)
        text = record.getMessage()
        if record.name.partition(".")[0] not in ("headrace", "root"):
            text = f"{record.name}: {text}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        head = f"{_timestamp(record.created)} {record.levelname} {self.service}{shown}"
        return f"{head}: {_truncated(self._redacted(text))}".translate(_CONTROL).replace("\n", "\n  ")

    def _redacted(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "...")
        return redact_url_passwords(text)


def set_up_logging(service: str, **fields: Field) -> None:
    """Sets up logging for the process. A field's value may be a function, which is called for every line."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(LineFormatter(service, **fields))
    logging.basicConfig(level=logging.INFO, handlers=[stderr])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.captureWarnings(True)


@contextmanager
def log_to_file(path: Path, service: str, **fields: Field) -> Iterator[None]:
    """Appends everything that this process logs inside the block to a file."""
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


def add_process_fields(**fields: Field) -> None:
    """Adds the fields to every further line of the process."""
    for formatter in _formatters():
        formatter.fields |= fields


def redact(secret: str) -> None:
    """Replaces the secret with `...` in every further line of the process."""
    for formatter in _formatters():
        formatter.secrets |= {secret} - {""}


def _formatters() -> list[LineFormatter]:
    found = [handler.formatter for handler in logging.getLogger().handlers]
    return [formatter for formatter in found if isinstance(formatter, LineFormatter)]


def parse_line(line: str) -> LogLine | None:
    """The event whose first line this is; None for any other line."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    fields = dict(pair.split("=", 1) for pair in found["fields"].split())
    at = datetime.fromisoformat(found["time"]).timestamp()
    return LogLine(at, found["level"], found["service"], fields, found["message"])


def format_line(line: LogLine) -> str:
    """The event as a log has it."""
    shown = "".join(f" {name}={value}" for name, value in line.fields.items())
    return f"{_timestamp(line.at)} {line.level} {line.service}{shown}: {line.message}".replace("\n", "\n  ")


def line_as_dict(line: LogLine) -> dict[str, Any]:
    """The event for programs: the fields beside the other keys, `tickets` as a list."""
    fields: dict[str, Any] = dict(line.fields)
    if "tickets" in fields:
        fields["tickets"] = fields["tickets"].split(",")
    if str(fields.get("step", "")).isdecimal():
        fields["step"] = int(fields["step"])
    return {
        "time": _timestamp(line.at),
        "level": line.level,
        "service": line.service,
        **fields,
        "message": line.message,
    }


def _timestamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(at * 1000) % 1000:03d}Z"


def _field_text(field: Field) -> str:
    value = field() if callable(field) else field
    text = str(value) if isinstance(value, str | int) else ",".join(value)
    return re.sub(r"[\s,]" if isinstance(value, str) else r"\s", "_", text) or "-"


def _truncated(text: str) -> str:
    if len(text) <= MAX_MESSAGE_CHARS:
        return text
    half = MAX_MESSAGE_CHARS // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
