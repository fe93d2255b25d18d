"""The launcher's progress view: start-up phases, then one live table of the run; plain lines without a terminal.

It knows only the run's keys in Redis, so it shows the same as any other observer would. It never blocks: while Redis
is unreachable it says so and tries again, and it skips what it cannot decode.
"""

import json
import logging
import re
import time
from contextlib import suppress
from time import monotonic
from typing import Any, Self

import msgspec
import redis
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from headrace.common.process.waiting import Reason
from headrace.common.redis.keys import Keys
from headrace.common.wire import WireError, decode_heartbeat, one_line
from headrace.launcher.run.redis_server import short_timeout_client
from headrace.launcher.terminal.step_table import EvaluationEvent, StepEvent, step_line, step_table

REDIS_TIMEOUT_S = 1.0
SHOWN_AFTER_S = 5.0
"""Without a terminal, a reason to wait is printed after it has lasted this long."""
DEAD_LETTERS_EVERY_S = 30.0
NUMBER = re.compile(r"\d+")
REASONS = re.compile(r" \(.*?\)(?=,|$)")
_log = logging.getLogger(__name__)
ROUTINE_PHASES = {"learner: waiting", "learner: training"}


class ProgressView:
    """Follows a run's events; call `refresh` regularly in its `with` block."""

    def __init__(self, redis_url: str, keys: Keys, num_steps: int, console: Console, is_json: bool = False) -> None:
        self.client = short_timeout_client(redis_url, REDIS_TIMEOUT_S)
        self.keys = keys
        self.num_steps = num_steps
        self.console = console
        self.is_json = is_json
        """Whether every line is a JSON object, for programs."""
        self.started = monotonic()
        self.step = 0
        """The highest step that the learner has reported."""
        self.learner_url = ""
        self.reason = ""
        """Why the learner waits, or how it ended; empty while it works."""
        self.is_scaled_to_0 = False
        self.num_dead_letters = 0
        self._num_dead_letters_shown = 0
        self._dead_letters_shown_at = -DEAD_LETTERS_EVERY_S
        self._dead_letter_reason = self._reward_problem = self._shown_reward_problem = ""
        self._seen = "0"
        self._steps: list[StepEvent] = []
        self._evaluations: list[EvaluationEvent] = []
        self._phase = ""
        self._shown_phase = "", ""
        self._reason_since = self.started
        self._shown_reason = ""
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal and not is_json else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self.client.close()

    def skip_to_now(self) -> None:
        """Skips the events of the run's previous launches."""
        newest: Any = self.client.xrevrange(self.keys.events, count=1)
        self._seen = newest[0][0].decode() if newest else "0"
        self._read_learner()

    def clear_learner_status(self) -> None:
        """Deletes what the previous learner reported, so that it is not shown for the next one."""
        with suppress(redis.RedisError):
            self.client.hdel(self.keys.learner, "phase", "reason", "waits", "url")

    def refresh(self) -> None:
        """Reads what has happened since the last call, and shows it."""
        try:
            phase = f"learner: {self._read_learner()}; replicas: {self._describe_replicas()}"
            self._show_phase(phase)
            self._show_failures()
            for kind, payload in self._new_events():
                self._handle(kind, payload)
        except redis.RedisError:
            self._show_phase("Redis unreachable")
        if self._live:
            self._live.update(self._render())

    def latest_step(self) -> int:
        """The highest step reported, even if the learner reported it a moment ago and ended."""
        with suppress(redis.RedisError):
            self._read_learner()
        return self.step

    def latest_reason(self) -> str:
        with suppress(redis.RedisError):
            self._read_learner()
        return self.reason

    def say(self, text: str) -> None:
        _log.info("%s", text)
        if self.is_json:
            print(json.dumps({"at": time.time(), "text": text}, ensure_ascii=False), flush=True)
            return
        self.console.print(Text(f"[{monotonic() - self.started:6.1f} s] {text}"), soft_wrap=True)

    def _read_learner(self) -> str:
        """Reads the learner's fields and returns its phase."""
        found: dict[bytes, bytes] = self.client.hgetall(self.keys.learner)
        fields = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()}
        with suppress(ValueError):
            self.step = max(self.step, int(fields.get("step", "")))
        self.learner_url = fields.get("url", "")
        reason = fields.get("reason", "")
        if NUMBER.sub("", reason) != NUMBER.sub("", self.reason):
            self._reason_since = monotonic()
        self.reason = reason
        return fields.get("phase", "loading the model")

    def _describe_replicas(self) -> str:
        counts: dict[str, int] = {}
        self._reward_problem = ""
        nobody = "none, scaled to 0: generation is paused" if self.is_scaled_to_0 else "none yet"
        for name in sorted(self.client.scan_iter(match=self.keys.replicas + "*", count=1000)):
            with suppress(WireError):
                replica = decode_heartbeat(self.client.get(name) or b"")
                state = f"{replica.state} ({replica.reason})" if replica.reason else replica.state
                if Reason.REWARDS_FAILING in replica.waits:
                    self._reward_problem = f"{replica.replica}: {replica.reason}"
                counts[state] = counts.get(state, 0) + 1
        return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or nobody

    def _show_failures(self) -> None:
        """Shows dead letters and failing rewards when they begin, and dead letters from time to time."""
        self.num_dead_letters = int(self.client.xlen(self.keys.dead_letters))
        newest: Any = self.client.xrevrange(self.keys.dead_letters, count=1) if self.num_dead_letters else []
        self._dead_letter_reason = one_line(newest[0][1].get(b"reason", b"").decode(errors="replace")) if newest else ""
        if self._live:
            return
        problem = NUMBER.sub("", self._reward_problem)
        if problem and not self._shown_reward_problem:
            self.say(self._reward_problem)
        self._shown_reward_problem = problem
        is_due = monotonic() - self._dead_letters_shown_at >= DEAD_LETTERS_EVERY_S
        if is_due and self.num_dead_letters > self._num_dead_letters_shown:
            self._dead_letters_shown_at = monotonic()
            self._num_dead_letters_shown = self.num_dead_letters
            self.say(self.dead_letters())

    def dead_letters(self) -> str:
        """A line such as `3 tickets are dead (headrace dead-letters list --run demo), the latest: ValueError: ...`."""
        are = "ticket is" if self.num_dead_letters == 1 else "tickets are"
        command = f"headrace dead-letters list --run {self.keys.run}"
        return f"{self.num_dead_letters} {are} dead ({command}), the latest: {self._dead_letter_reason}"

    def _new_events(self) -> Any:
        found: Any = self.client.xrange(self.keys.events, min=f"({self._seen}")
        for entry_id, fields in found:
            self._seen = entry_id.decode()
            yield fields.get(b"kind"), fields.get(b"event", b"")

    def _handle(self, kind: bytes | None, payload: bytes) -> None:
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            if kind == b"step":
                step = msgspec.json.decode(payload, type=StepEvent)
                self._steps.append(step)
                if not self._live:
                    self.say(step_line(step, self.num_steps))
            elif kind == b"evaluation":
                evaluation = msgspec.json.decode(payload, type=EvaluationEvent)
                self._evaluations.append(evaluation)
                self.say(
                    f"held-out pass@1 {evaluation.held_out:.3f} after step {evaluation.step}, "
                    f"{evaluation.num_completions} completions"
                )

    def _show_phase(self, phase: str) -> None:
        """Without a terminal, prints a changed phase; after the first step not waiting and training alone."""
        learner, _, replicas = REASONS.sub("", phase).partition("; ")
        is_new = (learner, replicas) != self._shown_phase
        is_routine = bool(self._steps) and learner in ROUTINE_PHASES and replicas == self._shown_phase[1]
        self._phase = phase
        self._shown_phase = learner, replicas
        if self._live:
            return
        if is_new and not is_routine:
            self.say(phase)
        has_lasted = monotonic() - self._reason_since >= SHOWN_AFTER_S
        if not self.reason:
            self._shown_reason = ""
        elif has_lasted and NUMBER.sub("", self.reason) != self._shown_reason:
            self._shown_reason = NUMBER.sub("", self.reason)
            self.say(f"the learner waits: {self.reason}")

    def _render(self) -> Group:
        latest = f", held-out pass@1 {self._evaluations[-1].held_out:.3f}" if self._evaluations else ""
        done = self._steps[-1].step if self._steps else 0
        notes = f" · waits: {self.reason}" if self.reason else ""
        notes += f" · {self.dead_letters()}" if self.num_dead_letters else ""
        head = Text(
            f"step {done} of {self.num_steps}{latest} · {monotonic() - self.started:.0f} s · {self._phase}{notes}"
        )
        return Group(head, step_table(self._steps, self._evaluations)) if self._steps else Group(head)
