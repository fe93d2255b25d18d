"""The learner's `/metrics`: the contents of `/status`, and further numbers of the learner's components.

Each scrape reads memory (and the sizes of two files), so that no scrape waits for Redis, torch or the loop. Counters
count from the start of this process; totals of the whole run are gauges.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from headrace.common.metrics.families import Families
from headrace.common.metrics.replicas import add_learner_waits, add_replica_states
from headrace.common.metrics.run import GroupTotals, add_desired_state, add_files, add_progress, add_queues
from headrace.common.metrics.steps import StepTotals, add_latest_evaluation, add_latest_step
from headrace.common.weights.files import DELTA_FILE, MODEL_FILE
from headrace.learner.intake.intake import Intake
from headrace.learner.weights.publisher import WeightVersions


class LearnerMetrics:
    """Collects all metric families; called at each scrape."""

    def __init__(
        self,
        status: Callable[[], dict[str, Any]],
        rows: Sequence[Mapping[str, Any]],
        intake: Intake,
        versions: WeightVersions,
    ) -> None:
        """`rows` grows by one per step and one per evaluation; the rows already in it are of earlier starts."""
        self._status = status
        self._rows = rows
        self._intake = intake
        self._versions = versions
        self._groups = GroupTotals(intake.settlement_log.counts)
        self._steps = StepTotals()
        self._num_seen = len(rows)

    def __call__(self) -> Families:
        status, intake, log = self._status(), self._intake, self._intake.settlement_log
        families, latest = Families(run=status["run"]), status["latest"]
        progress = ("phase", "step", "target_steps", "weight_version", "fencing_epoch")
        add_progress(families, **{name: status[name] for name in progress})
        add_learner_waits(families, {wait["reason"]: wait["for_s"] for wait in status["waits"]})
        add_desired_state(
            families,
            desired=status["desired_replicas"],
            advised=status["advised_replicas"],
            settings_version=status.get("settings_version"),
        )
        add_latest_step(families, latest.get("step", {}))
        add_latest_evaluation(families, latest.get("evaluation", {}))
        self._add_new_rows()
        self._steps.collect(families)
        self._groups.collect(families, status["counts"])
        add_queues(
            families,
            open_tickets=intake.queue.open_tickets,
            stream_length=intake.queue.in_stream,
            unread=intake.num_unread,
        )
        text = "Bytes of consumed groups that no checkpoint has recorded yet."
        families.gauge("headrace_unsettled_group_bytes", text, log.unsettled_bytes)
        add_replica_states(families, intake.control_state.replicas)
        add_files(families, latest.get("checkpoint", {}), self._version_bytes())
        return families

    def _add_new_rows(self) -> None:
        while self._num_seen < len(self._rows):
            self._steps.add(self._rows[self._num_seen])
            self._num_seen += 1

    def _version_bytes(self) -> dict[str, int]:
        """Sizes of the newest version's files, which may be deleted at any time."""
        found = {}
        for kind, name in (("delta", DELTA_FILE), ("model", MODEL_FILE)):
            with suppress(OSError):
                if path := self._versions.file_of(self._versions.current, name):
                    found[kind] = path.stat().st_size
        return found
