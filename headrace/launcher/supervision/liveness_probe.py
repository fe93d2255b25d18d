"""Polls whether the learner still answers, in a thread, so that a hung learner cannot block the launcher."""

import threading
import time
from typing import Self

import httpx

PROBE_INTERVAL_S = 2.0
PROBE_TIMEOUT_S = 5.0


class LivenessProbe:
    """Polls `/healthz` of one process while the `with` block runs.

    A process that has never answered is still loading. Silence is summed over probes, so that time in which the
    launcher itself was suspended does not count.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._target: tuple[str, int] | None = None
        self._has_answered = False
        self._silent_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._probe, name="health", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def silent_s(self, url: str, pid: int) -> float:
        """How long the process `pid` at `url` has not answered, after it had. It is the one polled from now on."""
        with self._lock:
            if self._target != (url, pid):
                self._target, self._has_answered, self._silent_s = (url, pid), False, 0.0
            return self._silent_s

    def _probe(self) -> None:
        while not self._ended.wait(PROBE_INTERVAL_S):
            target, started = self._target, time.monotonic()
            if target is None or not target[0]:
                continue
            is_answered = _answers(target[0])
            with self._lock:
                if target != self._target:
                    continue
                self._has_answered |= is_answered
                if is_answered:
                    self._silent_s = 0.0
                elif self._has_answered:
                    self._silent_s += min(time.monotonic() - started, PROBE_TIMEOUT_S) + PROBE_INTERVAL_S


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=PROBE_TIMEOUT_S, trust_env=False).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
