"""What the launcher shows: start-up phases, then one live table of the run; plain lines where there is no terminal.

Knows only the run's keys in Redis, so it shows the same as any other observer would. It never blocks: while Redis
is unreachable it says so and tries again, and it skips what it cannot decode.
"""

import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Self

import msgspec
import redis
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace.common.process.waiting import Reason
from headrace.common.redis.keys import Keys
from headrace.common.wire import WireError, decode_heartbeat, one_line
from headrace.launcher.run.processes import short_timeout_client

NUM_ROWS = 12
LOOK_TIMEOUT_S = 1.0
TOLD_AFTER_S = 5.0
"""A reason to wait that has lasted so long is told where there is no table to show it."""
DEAD_TOLD_EVERY_S = 30.0
NUMBER = re.compile(r"\d+")
REASONS = re.compile(r" \(.*?\)(?=,|$)")
_log = logging.getLogger(__name__)
ORDINARY = {"learner: waiting", "learner: training"}


class StepEvent(msgspec.Struct):
    """What is shown of a step; its floats are null where they are not finite."""

    step: int
    generated_tokens: int
    reward_mean: float | None
    staleness_mean: float | None
    uniform_share: float | None
    wall_s: float | None
    wait_s: float | None
    step_s: float | None
    kl_behaviour_proximal: float | None


class EvaluationEvent(msgspec.Struct):
    step: int
    held_out: float
    num_completions: int


class ProgressView:
    """Follows a run's events; call `look` again and again between `with`."""

    def __init__(self, redis_url: str, keys: Keys, num_steps: int, console: Console, is_json: bool = False) -> None:
        self.client = short_timeout_client(redis_url, LOOK_TIMEOUT_S)
        self.keys = keys
        self.num_steps = num_steps
        self.console = console
        self.is_json = is_json
        """What is said is an object a line, for programs."""
        self.started = monotonic()
        self.step = 0
        """The highest that the learner has reported."""
        self.learner_url = ""
        self.reason = ""
        """Why the learner waits, or how it ended; empty while it works."""
        self.is_scaled_to_0 = False
        self.num_dead = 0
        """Tickets."""
        self._num_dead_told = 0
        self._dead_told_at = -DEAD_TOLD_EVERY_S
        self._dead_reason = self._reward_problem = self._told_reward_problem = ""
        self._seen = "0"
        self._steps: list[StepEvent] = []
        self._evaluations: list[EvaluationEvent] = []
        self._phase = ""
        self._told_phase = "", ""
        self._reason_since = self.started
        self._told_reason = ""
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
        """What an earlier life of the run had told is not told again."""
        newest: Any = self.client.xrevrange(self.keys.events, count=1)
        self._seen = newest[0][0].decode() if newest else "0"
        self._read_learner()

    def forget_learner(self) -> None:
        """What an earlier learner said of itself is not shown of the next one."""
        with suppress(redis.RedisError):
            self.client.hdel(self.keys.learner, "phase", "reason", "url")

    def look(self) -> None:
        """Takes in what happened since the last look, and shows it."""
        try:
            phase = f"learner: {self._read_learner()}; replicas: {self._describe_replicas()}"
            self._tell(phase)
            self._look_at_dead()
            for kind, payload in self._new_events():
                self._take(kind, payload)
        except redis.RedisError:
            self._tell("Redis unreachable")
        if self._live:
            self._live.update(self._render())

    def latest_step(self) -> int:
        """The highest step seen, also when the learner reported it a moment ago and ended."""
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
        """The learner's phase."""
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
                if Reason.REWARDS in replica.reason:
                    self._reward_problem = f"{replica.replica}: {replica.reason}"
                counts[state] = counts.get(state, 0) + 1
        return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or nobody

    def _look_at_dead(self) -> None:
        """What dies, and by what, is told as it begins, and from time to time."""
        self.num_dead = int(self.client.xlen(self.keys.dead))
        newest: Any = self.client.xrevrange(self.keys.dead, count=1) if self.num_dead else []
        self._dead_reason = one_line(newest[0][1].get(b"reason", b"").decode(errors="replace")) if newest else ""
        if self._live:
            return
        problem = NUMBER.sub("", self._reward_problem)
        if problem and not self._told_reward_problem:
            self.say(self._reward_problem)
        self._told_reward_problem = problem
        if self.num_dead > self._num_dead_told and monotonic() - self._dead_told_at >= DEAD_TOLD_EVERY_S:
            self._dead_told_at = monotonic()
            self._num_dead_told = self.num_dead
            self.say(self.dead())

    def dead(self) -> str:
        """Such as `3 tickets are dead (headrace dead-letters list --run demo), the latest: ValueError: ...`."""
        are = "ticket is" if self.num_dead == 1 else "tickets are"
        command = f"headrace dead-letters list --run {self.keys.run}"
        return f"{self.num_dead} {are} dead ({command}), the latest: {self._dead_reason}"

    def _new_events(self) -> Any:
        found: Any = self.client.xrange(self.keys.events, min=f"({self._seen}")
        for entry_id, fields in found:
            self._seen = entry_id.decode()
            yield fields.get(b"kind"), fields.get(b"event", b"")

    def _take(self, kind: bytes | None, payload: bytes) -> None:
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            if kind == b"step":
                step = msgspec.json.decode(payload, type=StepEvent)
                self._steps.append(step)
                if not self._live:
                    cells = ", ".join(f"{name} {_cell(value, step)}" for name, value in COLUMNS.items())
                    self.say(f"{cells} (of {self.num_steps} steps)")
            elif kind == b"evaluation":
                evaluation = msgspec.json.decode(payload, type=EvaluationEvent)
                self._evaluations.append(evaluation)
                self.say(
                    f"held-out pass@1 {evaluation.held_out:.3f} after step {evaluation.step}, "
                    f"{evaluation.num_completions} completions"
                )

    def _tell(self, phase: str) -> None:
        """Without a terminal: a line for what is new; once there are steps, not for each turn to wait or train."""
        learner, _, replicas = REASONS.sub("", phase).partition("; ")
        is_new = (learner, replicas) != self._told_phase
        is_ordinary = bool(self._steps) and learner in ORDINARY and replicas == self._told_phase[1]
        self._phase = phase
        self._told_phase = learner, replicas
        if self._live:
            return
        if is_new and not is_ordinary:
            self.say(phase)
        has_lasted = monotonic() - self._reason_since >= TOLD_AFTER_S
        if not self.reason:
            self._told_reason = ""
        elif has_lasted and NUMBER.sub("", self.reason) != self._told_reason:
            self._told_reason = NUMBER.sub("", self.reason)
            self.say(f"the learner waits: {self.reason}")

    def _render(self) -> Group:
        table = Table(title=None)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        table.add_column("held-out", justify="right")
        held_out = {event.step: f"{event.held_out:.3f}" for event in self._evaluations}
        for event in self._steps[-NUM_ROWS:]:
            table.add_row(*(_cell(value, event) for value in COLUMNS.values()), held_out.get(event.step, ""))
        latest = f", held-out pass@1 {self._evaluations[-1].held_out:.3f}" if self._evaluations else ""
        done = self._steps[-1].step if self._steps else 0
        waits = f" · waits: {self.reason}" if self.reason else ""
        waits += f" · {self.dead()}" if self.num_dead else ""
        head = Text(
            f"step {done} of {self.num_steps}{latest} · {monotonic() - self.started:.0f} s · {self._phase}{waits}"
        )
        return Group(head, table) if self._steps else Group(head)


def _cell(value: Callable[[StepEvent], str], event: StepEvent) -> str:
    try:
        return value(event)
    except TypeError:  # a null
        return "–"


COLUMNS: dict[str, Callable[[StepEvent], str]] = {
    "step": lambda e: str(e.step),
    "reward": lambda e: f"{e.reward_mean:.3f}",
    "staleness": lambda e: f"{e.staleness_mean:.2f}",
    "uniform": lambda e: f"{e.uniform_share:.0%}",
    "tokens/s": lambda e: f"{e.generated_tokens / max(e.wall_s or 0, 1e-9):.0f}",
    "waited": lambda e: f"{e.wait_s:.2f} s",
    "step time": lambda e: f"{e.step_s:.2f} s",
    "KL": lambda e: f"{e.kl_behaviour_proximal:.4f}",
}
