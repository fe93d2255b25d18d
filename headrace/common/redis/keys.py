"""The names of a run's keys in Redis: `headrace:{<run>}:…`, the braces literal, so that a run is one hash slot.

key           type                        content                                               written by
tickets       stream, group `generation`  open work, leased by replicas                         learner
eval_tickets  stream, group `generation`  evaluation tickets, beside admission                  learner
groups        stream                      scored groups, each exactly once per ticket           replicas
eval_groups   stream                      scored evaluation groups, outside admission           replicas
dead_letters  stream                      what could not be generated, scored or decoded        either
ledger        hash                        ticket id -> ledger entry (common/wire/ledger.py)     either
retries       set                         dead tickets to be issued again                       headrace dead-letters
cursor        hash                        position of the next prompt, and in which data        learner
replicas      prefix of keys with a TTL   heartbeats                                            replicas
learner       hash                        step, weight version, phase, waits (code -> seconds)  learner
epoch         counter                     fences learners                                       learner
epochs        hash                        a learner's start -> the epoch that it took           learner
write_number  counter                     the latest write of the epoch's learner               learner
weights       hash                        newest version, its manifest's SHA-256, URL, folder   learner
swap_slots    sorted set                  replicas that swap, by when their slot expires        replicas
versions      hash                        weight version -> the step that made it               learner
config        string                      the resolved configuration, for replicas that join    learner
task_method   string                      `reward` or `rollout`, whichever the task has         learner
control       hash                        desired state (common/wire/desired_state.py)          control, command line
launcher      string, TTL                 host and process of the launcher that follows it      launcher
events        stream, bounded             what happened, for the page and the command line      everybody
history       stream, bounded             rows of numbers; the last one of a step counts        learner
samples       stream, bounded             a sample of groups for people to read                 learner
"""

import re

MAX_EVENTS = 10_000
MAX_HISTORY = 20_000
MAX_SAMPLES = 256
TICKET_GROUP = "generation"
"""Consumer group of `tickets` and `eval_tickets`."""


def key_pattern(name: str) -> str:
    """A pattern for SCAN that matches the key of this name in every run."""
    return f"headrace:{{*}}:{name}"


def run_in_key(key: bytes) -> str:
    """The name of the run that a key belongs to."""
    return key.decode(errors="replace").partition("{")[2].partition("}")[0]


class Keys:
    """The keys of one run. Raises `ValueError` for a name that cannot be a hash tag or a folder."""

    def __init__(self, run: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run):
            raise ValueError(
                f"run {run!r}: expected 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
            )
        self.run = run
        prefix = f"headrace:{{{run}}}:"
        self.tickets = prefix + "tickets"
        self.eval_tickets = prefix + "eval_tickets"
        self.groups = prefix + "groups"
        self.eval_groups = prefix + "eval_groups"
        self.dead_letters = prefix + "dead_letters"
        self.ledger = prefix + "ledger"
        self.retries = prefix + "retries"
        self.cursor = prefix + "cursor"
        self.replicas = prefix + "replicas:"
        self.learner = prefix + "learner"
        self.epoch = prefix + "epoch"
        self.epochs = prefix + "epochs"
        self.write_number = prefix + "write_number"
        self.weights = prefix + "weights"
        self.swap_slots = prefix + "swap_slots"
        self.versions = prefix + "versions"
        self.config = prefix + "config"
        self.task_method = prefix + "task_method"
        self.control = prefix + "control"
        self.launcher = prefix + "launcher"
        self.events = prefix + "events"
        self.history = prefix + "history"
        self.samples = prefix + "samples"

    def replica(self, replica: str) -> str:
        return self.replicas + replica
