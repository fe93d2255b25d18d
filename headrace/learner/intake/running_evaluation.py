"""The evaluation in progress: issues its tickets, collects its groups, and waits for its result."""

import logging
import time
from collections.abc import Callable, Mapping

from headrace.common.wire import Group
from headrace.learner.intake.group_source import GroupSource
from headrace.learner.intake.held_out import Evaluation
from headrace.learner.intake.lock import IntakeLock
from headrace.learner.intake.outcomes import GroupOutcomes
from headrace.learner.store.store import LearnerStore

POLL_S = 0.2
_log = logging.getLogger(__name__)


class RunningEvaluation:
    """At most one evaluation at a time. Safe to use from any thread."""

    def __init__(
        self,
        store: LearnerStore,
        source: GroupSource,
        version_steps: Mapping[int, int],
        outcomes: GroupOutcomes,
        lock: IntakeLock,
    ) -> None:
        self._store = store
        self._source = source
        self._version_steps = version_steps
        self._outcomes = outcomes
        self._lock = lock
        self._evaluation: Evaluation | None = None

    def begin(self, step: int, version: int) -> None:
        """Issues the tickets of the evaluation after `step`; the one before must be finished."""
        tickets = self._source.evaluation_tickets(step, version)
        with self._lock:
            assert self._evaluation is None
            self._evaluation = Evaluation.of(step, version, tickets)
            self._outcomes.begin_evaluation()
        self._store.add_tickets(self._store.keys.eval_tickets, tickets)
        ticket_ids = [ticket.id for ticket in tickets]
        _log.info("issued for an evaluation", extra={"tickets": ticket_ids, "version": version})

    @property
    def is_running(self) -> bool:
        """Its result has not been taken yet."""
        return self._evaluation is not None

    @property
    def is_first_open(self) -> bool:
        """The evaluation of the run's initial weights still waits for completions."""
        evaluation = self._evaluation
        return evaluation is not None and evaluation.step == 0 and not evaluation.is_done

    def collect(self, group: Group) -> None:
        with self._lock:
            if self._evaluation is not None:
                self._evaluation.collect(group, self._version_steps)

    def note_dead_tickets(self) -> None:
        """Asks the ledger which of the awaited tickets are dead; the evaluation leaves them out."""
        with self._lock:
            names = sorted(self._evaluation.waiting_for) if self._evaluation is not None else []
            if self._evaluation is None or not names:
                return
            for name, known in zip(names, self._store.ledger_entries(names), strict=True):
                if known is not None and known.state == "dead":
                    self._evaluation.mark_dead(name, self._store.dead_reason(known))
            self._lock.notify_all()

    def take_result(
        self, timeout_s: float = 0.0, is_interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The result, once it is complete; None if it is not after `timeout_s` seconds, or when interrupted."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while self._evaluation is not None:
                self._lock.raise_failure()
                if self._evaluation.is_done:
                    result = self._evaluation.result()
                    self._evaluation = None
                    return result
                remaining = deadline - time.monotonic()
                if remaining <= 0 or is_interrupted():
                    return None
                self._lock.wait(min(remaining, POLL_S))
        return None
