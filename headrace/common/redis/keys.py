"""The names of a run's keys in Redis: `headrace:{<run>}:…`, the braces literal, so that a run is one hash slot.

tickets     stream, group `generation`   open work, leased by replicas                        written by learner
eval        stream, group `generation`   evaluation tickets, beside admission                 learner
groups      stream                       scored groups, each exactly once per ticket          replicas
evaluated   stream                       scored evaluation groups, outside admission          replicas
dead        stream                       what could not be generated, scored or decoded       either
ledger      hash                         ticket id -> mark (headrace/common/wire/ledger.py)                 either
retries     set                          dead tickets to be issued again                      headrace dead-letters
cursor      hash                         epoch and place of the next prompt, and of what data learner
replicas    hash-slot prefix, TTL keys   heartbeats                                           replicas
learner     hash                         step, version, phase, its waits (code -> seconds)      learner
epoch       counter                      fences learners                                      learner
epochs      hash                         a learner's start -> the epoch that it took          learner
weights     hash                         newest version, its manifest's SHA-256, URL, folder  learner
swapping    sorted set                   replicas that swap, by when their turn ends          replicas
versions    hash                         weight version -> the step that made it              learner
config      string                       the resolved configuration, for replicas that join   learner
control     hash                         what is ordered (common/wire/control.py)             control, command line
launcher    string, TTL                  host and process of the launcher that obeys it       launcher
events      stream, bounded              what happened, for the page and the command line     everybody
history     stream, bounded              rows of numbers; the last one of a step counts       learner
shown       stream, bounded              a sample of groups for people to read                learner
"""

import re

MAX_EVENTS = 10_000
MAX_HISTORY = 20_000
MAX_SHOWN = 256
TICKET_GROUP = "generation"
"""Consumer group of `tickets` and `eval`."""


def key_pattern(name: str) -> str:
    """A pattern of the key of that name, whatever the run."""
    return f"headrace:{{*}}:{name}"


def run_in_key(key: bytes) -> str:
    """The run whose key this is."""
    return key.decode(errors="replace").partition("{")[2].partition("}")[0]


class Keys:
    """Raises `ValueError` for a run name that would not be one hash slot or one folder."""

    def __init__(self, run: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run):
            raise ValueError(
                f"run {run!r}: expected 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
            )
        self.run = run
        prefix = f"headrace:{{{run}}}:"
        self.tickets = prefix + "tickets"
        self.eval = prefix + "eval"
        self.groups = prefix + "groups"
        self.evaluated = prefix + "evaluated"
        self.dead = prefix + "dead"
        self.ledger = prefix + "ledger"
        self.retries = prefix + "retries"
        self.cursor = prefix + "cursor"
        self.replicas = prefix + "replicas:"
        self.learner = prefix + "learner"
        self.epoch = prefix + "epoch"
        self.epochs = prefix + "epochs"
        self.weights = prefix + "weights"
        self.swapping = prefix + "swapping"
        self.versions = prefix + "versions"
        self.config = prefix + "config"
        self.control = prefix + "control"
        self.launcher = prefix + "launcher"
        self.events = prefix + "events"
        self.history = prefix + "history"
        self.shown = prefix + "shown"

    def replica(self, replica: str) -> str:
        return self.replicas + replica
