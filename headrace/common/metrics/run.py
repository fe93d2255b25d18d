"""Metrics of a run's progress, exported by the learner and, for the whole run, by control."""

from collections.abc import Mapping
from typing import get_args

from headrace.common.metrics.families import Families
from headrace.common.wire import DecidedState

PHASES = (
    "starting",
    "waiting for a replica",
    "evaluating",
    "waiting",
    "training",
    "paused",
    "finished",
    "stopped",
    "starved",
    "failed",
)
STATES = (*get_args(DecidedState), "dead")


def add_progress(
    families: Families, *, phase: str, step: int, target_steps: int, weight_version: int, fencing_epoch: int
) -> None:
    families.state_set("headrace_phase", "1 for what the learner does.", "phase", PHASES, phase)
    families.gauge("headrace_completed_steps", "Completed steps.", step)
    families.gauge("headrace_target_steps", "Number of steps of the whole run.", target_steps)
    families.gauge("headrace_weight_version", "Newest published weight version.", weight_version)
    families.gauge("headrace_fencing_epoch", "Fencing epoch: grows by one at each learner start.", fencing_epoch)


def add_desired_state(
    families: Families, *, desired: int | None, advised: int | None, settings_version: int | None
) -> None:
    families.gauge("headrace_desired_replicas", "Target number of replicas; absent if no target is set.", desired)
    families.gauge(
        "headrace_advised_replicas",
        "Number of replicas that would keep the learner busy, by its measurements.",
        advised,
    )
    families.gauge(
        "headrace_settings_version", "Version of the changed settings that the learner uses.", settings_version
    )


def add_queues(families: Families, *, open_tickets: int, stream_length: int, unread: int | None) -> None:
    families.gauge("headrace_open_tickets", "Training tickets that are not answered yet.", open_tickets)
    families.gauge(
        "headrace_group_stream_length",
        "Groups in the stream: waiting, in training, or kept for two checkpoints.",
        stream_length,
    )
    text = "Groups in the stream that the learner has not read yet (consumer lag)."
    families.gauge("headrace_unread_groups", text, unread)


class GroupTotals:
    """Finished groups by state, and generated tokens: of the run, and since this process began to collect."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        """`counts`: the run's counts so far; None: those of the first collection."""
        self._before = None if counts is None else dict(counts)
        self._since: dict[str, int] = {}

    def collect(self, families: Families, counts: Mapping[str, int]) -> None:
        """Work that a learner repeats after resuming from an earlier checkpoint is counted again."""
        before = counts if self._before is None else self._before
        for name in (*STATES, "generated_tokens"):
            grown = max(0, counts.get(name, 0) - before.get(name, 0))
            self._since[name] = self._since.get(name, 0) + grown
        self._before = dict(counts)
        for state in STATES:
            run, since = counts.get(state, 0), self._since[state]
            families.gauge("headrace_run_groups", "Finished groups of the run so far, by state.", run, state=state)
            families.counter("headrace_groups_total", "Finished groups, by state.", since, state=state)
        tokens = self._since["generated_tokens"]
        families.counter("headrace_generated_tokens_total", "Tokens of all groups that the learner received.", tokens)


def add_files(families: Families, checkpoint: Mapping[str, float], version_bytes: Mapping[str, int]) -> None:
    """`checkpoint`: step, time_s, seconds, bytes of the latest; `version_bytes`: the newest version's size by file."""
    families.gauge("headrace_checkpoint_seconds", "Time to write the latest checkpoint.", checkpoint.get("seconds"))
    families.gauge("headrace_checkpoint_bytes", "Size of the latest checkpoint.", checkpoint.get("bytes"))
    at = checkpoint.get("time_s")
    families.gauge("headrace_checkpoint_timestamp_seconds", "Time at which the latest checkpoint was durable.", at)
    families.gauge("headrace_checkpoint_step", "Step of the latest checkpoint.", checkpoint.get("step"))
    for file, num_bytes in version_bytes.items():
        families.gauge("headrace_version_bytes", "Size of the newest version's file.", num_bytes, file=file)
