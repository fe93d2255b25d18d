"""The kinds of events that the API's document gives as examples are those that the code emits."""

import re
from pathlib import Path

from headrace.control.models.history import Event

ROOT = Path(__file__).parents[2]
EMITTED = re.compile(r"""(?:announce\(\s*|add_event\(\s*|["']kind["']: |'kind', )["']([a-z_]+)["']""")
ROWS = {"step", "evaluation"}
"""Rows of metrics are announced by their kind."""


def test_examples_of_events_are_kinds_that_are_emitted() -> None:
    emitted = {kind for path in (ROOT / "headrace").rglob("*.py") for kind in EMITTED.findall(path.read_text())} | ROWS
    examples = Event.model_fields["kind"].examples or []
    assert {"weight_swap", "command", "settings_requested", "settings_applied", "guard"} <= emitted
    assert examples and set(examples) <= emitted
