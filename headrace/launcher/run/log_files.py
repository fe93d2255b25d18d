"""The logs of a run merged in the order of time: every file of its folder, rotated ones included.

Lines of Headrace's services carry fields (headrace/common/process/logs.py). Of Redis's and SGLang's lines only time and
level are parsed. A line without a time belongs to the line before it, or to the beginning of its file.
"""

import heapq
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from headrace.common.process.logs import LogLine, parse_line

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_REDIS = re.compile(r"\d+:\w (?P<time>\d\d \w{3} \d{4} \d\d:\d\d:\d\d\.\d{3}) (?P<mark>[.\-*#]) (?P<message>.*)")
_ENGINE = re.compile(r"(?:\[|\w+:\s+)?(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S*(?: \w+\])? (?P<message>.*)")
_LEVEL = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MAX_LINES = 400
"""Lines of one event; more are omitted."""


class LogFilter(NamedTuple):
    """Which lines are wanted; None: all."""

    service: str | None = None
    """A service, or the beginning of a file name such as `generation-0`."""
    level: str | None = None
    """The minimum level."""
    ticket: str | None = None
    step: int | None = None

    def matches(self, line: LogLine, file: str) -> bool:
        fields = line.fields
        return (
            (self.service is None or line.service == self.service or file.startswith(self.service))
            and (self.level is None or _rank(line.level) >= _rank(self.level))
            and (self.ticket is None or self.ticket in (fields.get("ticket"), *fields.get("tickets", "").split(",")))
            and (self.step is None or fields.get("step") == str(self.step))
        )


def read_logs(folder: Path, wanted: LogFilter) -> Iterator[LogLine]:
    """All matching lines that are present now, in the order of time. Raises `ValueError` without a log."""
    files = log_files(folder)
    if not files:
        raise ValueError(f"{folder}: there is no log")
    parts = [_wanted(LogFile(path).read_to_end(), wanted, path.name) for path in files]
    yield from heapq.merge(*parts, key=lambda line: line.at)


def log_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.log*") if path.is_file())


class LogFollower:
    """Lines written from now on, in all files of the folder, new files included."""

    def __init__(self, folder: Path, wanted: LogFilter) -> None:
        self._folder = folder
        self._wanted = wanted
        self._files = {path: LogFile(path, at_end=True) for path in log_files(folder)}

    def read_new(self) -> list[LogLine]:
        """The lines since the last call."""
        for path in log_files(self._folder):
            if path not in self._files:
                self._files[path] = LogFile(path)
        found = [_wanted(file.read_new(), self._wanted, path.name) for path, file in self._files.items()]
        return sorted((line for lines in found for line in lines), key=lambda line: line.at)


class LogFile:
    """One file, which may grow."""

    def __init__(self, path: Path, at_end: bool = False) -> None:
        self._path = path
        self._at = path.stat().st_size if at_end else 0
        self._service = "engine" if path.name.startswith("sglang") else path.name.partition(".")[0]
        self._time = 0.0

    def read_to_end(self) -> Iterator[LogLine]:
        with self._path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from self._events(line.removesuffix("\n") for line in file)

    def read_new(self) -> Iterator[LogLine]:
        """Whole lines only; from the beginning again if the file has become shorter."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            if self._path.stat().st_size < self._at:
                self._at = 0
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
            self._at += len(whole) + len(newline)
            yield from self._events(iter(whole.decode(errors="replace").split("\n") if newline else []))

    def _events(self, lines: Iterator[str]) -> Iterator[LogLine]:
        event: LogLine | None = None
        texts: list[str] = []
        written_at = self._path.stat().st_mtime
        for text in lines:
            clean = _ESCAPES.sub("", text)
            first = parse_line(clean) or self._parse_foreign(clean)
            if first is None and event is not None:
                texts += [clean.removeprefix("  ")] if len(texts) < MAX_LINES else []
                continue
            if event is not None:
                yield event._replace(at=event.at or (first.at if first else written_at), message="\n".join(texts))
            event = first or LogLine(self._time, _level_in_text(clean), self._service, {}, clean)
            texts, self._time = [event.message], event.at
        if event is not None:
            yield event._replace(at=event.at or written_at, message="\n".join(texts))

    def _parse_foreign(self, text: str) -> LogLine | None:
        if text.startswith(("Traceback ", "headrace ")):
            return LogLine(self._time, "ERROR", self._service, {}, text)
        with suppress(ValueError):
            if found := _REDIS.fullmatch(text):
                at = datetime.strptime(found["time"], "%d %b %Y %H:%M:%S.%f").timestamp()
                level = "WARNING" if found["mark"] == "#" else "INFO"
                return LogLine(at, level, "redis", {}, found["message"])
            if found := _ENGINE.fullmatch(text):
                at = datetime.strptime(found["time"], "%Y-%m-%d %H:%M:%S").timestamp()
                return LogLine(at, _level_in_text(text), self._service, {}, found["message"])
        return None


def _wanted(lines: Iterator[LogLine], wanted: LogFilter, file: str) -> Iterator[LogLine]:
    return (line for line in lines if wanted.matches(line, file))


def _level_in_text(text: str) -> str:
    found = _LEVEL.search(text)
    return found[1] if found else "INFO"


def _rank(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else 1
