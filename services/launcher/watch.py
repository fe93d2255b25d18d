"""What the launcher shows: start-up phases, then one live table of the run; plain lines where there is no terminal.

Reads the run's keys in Redis and nothing else, so it shows the same as any other watcher would.
"""

import time
from collections.abc import Callable
from typing import Any

import msgspec
import redis
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.keys import Keys
from common.wire import decode_heartbeat

NUM_ROWS = 12
Event = dict[str, Any]


class Watcher:
    """Follows a run's events; call `look` again and again between `with`."""

    def __init__(self, client: redis.Redis, keys: Keys, num_steps: int, console: Console) -> None:
        self.client = client
        self.keys = keys
        self.num_steps = num_steps
        self.console = console
        self.started = time.monotonic()
        self._seen = "0"
        self._steps: list[Event] = []
        self._evaluations: list[Event] = []
        self._phase = ""
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> "Watcher":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def skip_to_now(self) -> None:
        """What an earlier life of the run had told is not told again."""
        newest: Any = self.client.xrevrange(self.keys.events, count=1)
        self._seen = newest[0][0].decode() if newest else "0"

    def look(self) -> None:
        """Takes in what happened since the last look, and shows it."""
        phase = self._describe_phase()
        if phase != self._phase:
            self._phase = phase
            if not self._live and not self._is_training(phase):
                self.say(phase)
        found: Any = self.client.xrange(self.keys.events, min=f"({self._seen}")
        for entry_id, fields in found:
            self._seen = entry_id.decode()
            self._take(fields[b"kind"].decode(), msgspec.json.decode(fields[b"event"]))
        if self._live:
            self._live.update(self._render())

    def say(self, text: str) -> None:
        self.console.print(Text(f"[{time.monotonic() - self.started:6.1f} s] {text}"), soft_wrap=True)

    def _take(self, kind: str, event: Event) -> None:
        if kind == "step":
            self._steps.append(event)
            if not self._live:
                self.say(self._step_line(event))
        elif kind == "evaluation":
            self._evaluations.append(event)
            self.say(
                f"held-out pass@1 {event['held_out']:.3f} after step {event['step']}, "
                f"{event['num_completions']} completions"
            )

    def _step_line(self, event: Event) -> str:
        cells = ", ".join(f"{name} {value(event)}" for name, value in COLUMNS.items())
        return f"{cells} (of {self.num_steps} steps)"

    def _describe_phase(self) -> str:
        phase = (self.client.hget(self.keys.learner, "phase") or b"").decode()
        payloads = [self.client.get(name) for name in sorted(self.client.scan_iter(match=self.keys.replicas + "*"))]
        replicas = [decode_heartbeat(payload) for payload in payloads if payload]
        counts: dict[str, int] = {}
        for replica in replicas:
            state = f"{replica.state} ({replica.reason})" if replica.reason else replica.state
            counts[state] = counts.get(state, 0) + 1
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        return f"learner: {phase or 'loading the model'}; replicas: {states or 'none yet'}"

    def _is_training(self, phase: str) -> bool:
        return bool(self._steps) and phase.startswith(("learner: waiting;", "learner: training;"))

    def _render(self) -> Group:
        table = Table(title=None)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        table.add_column("held-out", justify="right")
        held_out = {event["step"]: f"{event['held_out']:.3f}" for event in self._evaluations}
        for event in self._steps[-NUM_ROWS:]:
            table.add_row(*(value(event) for value in COLUMNS.values()), held_out.get(event["step"], ""))
        latest = f", held-out pass@1 {self._evaluations[-1]['held_out']:.3f}" if self._evaluations else ""
        done = len(self._steps) and self._steps[-1]["step"]
        head = Text(
            f"step {done} of {self.num_steps}{latest} · {time.monotonic() - self.started:.0f} s · {self._phase}"
        )
        return Group(head, table) if self._steps else Group(head)


COLUMNS: dict[str, Callable[[Event], str]] = {
    "step": lambda e: str(e["step"]),
    "reward": lambda e: f"{e['reward_mean']:.3f}",
    "staleness": lambda e: f"{e['staleness_mean']:.2f}",
    "uniform": lambda e: f"{e['uniform_share']:.0%}",
    "tokens/s": lambda e: f"{e['generated_tokens'] / max(e['wall_s'], 1e-9):.0f}",
    "waited": lambda e: f"{e['wait_s']:.2f} s",
    "step time": lambda e: f"{e['step_s']:.2f} s",
    "KL": lambda e: f"{e['kl_behaviour_proximal']:.4f}",
}
