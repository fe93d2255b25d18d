"""The loop over the schedule: inject a fault, wait for recovery, audit; at the end let the run complete.

Prints a line for every fault and one for its recovery. Every wait has a deadline (test_bed.py).
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from chaos.accounting import STUCK_AFTER_STEPS, Violation, check, dead_tickets, gather, run_audit, stuck_groups
from chaos.disk import readable_checkpoints
from chaos.episodes.groups import GroupCounts
from chaos.faults import inject
from chaos.launched import CHECKPOINT_EVERY
from chaos.replacement import STEPS_AHEAD
from chaos.schedule import PARTS, Fault
from chaos.test_bed import InjectedFault, TestBed
from headrace.learner.checkpoints.record import RECORD_FILE, read_record

START_TIMEOUT_S = 300.0
RECOVERY_TIMEOUT_S = 240.0
END_TIMEOUT_S = 900.0
MIN_STEPS = 24
EXTRA_STEPS = 2
"""Number of steps after the last fault."""
AUDIT_EVERY = 3
AUDITED_PARTS = ("learner", "redis")


@dataclass
class Results:
    """The results of the disturbed run."""

    injected: list[InjectedFault] = field(default_factory=list)
    violations: dict[Violation, int] = field(default_factory=dict)
    """Violation -> number of the fault after which it was first seen; 0: at the end."""
    dead: dict[str, str] = field(default_factory=dict)
    num_steps: int = 0
    num_audits: int = 0
    groups: GroupCounts = field(default_factory=GroupCounts)
    failure: str = ""
    """The reason why the schedule was not completed."""


class KillMatrix:
    def __init__(
        self, test_bed: TestBed, faults: Sequence[Fault], groups_per_step: int, say: Callable[[str], None]
    ) -> None:
        self.test_bed = test_bed
        self.faults = faults
        self.groups_per_step = groups_per_step
        self.say = say
        self.results = Results(groups=test_bed.observer.group_checks.counts)
        self._unrecovered: list[InjectedFault] = []
        self._prefix = test_bed.observer.keys.tickets.removesuffix("tickets")

    def run(self) -> Results:
        """Runs the schedule up to the first fault that the run does not recover from, if there is one."""
        try:
            self._run()
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # `ChaosError`, or the audit's own failure
            self.results.failure = str(error)
        return self.results

    def _run(self) -> None:
        test_bed = self.test_bed
        test_bed.launched.start(STEPS_AHEAD)
        test_bed.wait_until(lambda: test_bed.observer.has_recovered(1.0, 1.0), START_TIMEOUT_S, "the first step")
        self.say(f"the run works: {test_bed.launched.num_replicas} replicas, step {test_bed.observer.step}")
        for place, fault in enumerate(self.faults):
            test_bed.wait(fault.pause_s)
            self._inject(fault)
            is_overlapped = place + 1 < len(self.faults) and self.faults[place + 1].overlaps
            if not is_overlapped:
                self._await_recovery()
        self._end()

    def _inject(self, fault: Fault) -> None:
        self.say(f"{self._name(fault)}: {'at the same time, ' if fault.overlaps else ''}{fault.kind} …")
        injected_fault = inject(self.test_bed, fault)
        held = f", for {fault.hold_s:.1f} s" if injected_fault.ended_s is None and fault.hold_s else ""
        self.say(f"{self._name(fault)}: {fault.kind}: {injected_fault.target}{held}")
        self.results.injected.append(injected_fault)
        self._unrecovered.append(injected_fault)

    def _await_recovery(self) -> None:
        last = self._unrecovered[-1]
        names = ", ".join(injected_fault.fault.kind for injected_fault in self._unrecovered)
        held_s = max(injected_fault.fault.hold_s for injected_fault in self._unrecovered)
        self.test_bed.wait_until(self._has_recovered, RECOVERY_TIMEOUT_S + held_s, f"a recovery from {names}")
        if last.recovery_s is None:
            last.recovery_s = time.time() - last.began_s
        notes = "; ".join(injected_fault.note for injected_fault in self._unrecovered if injected_fault.note)
        self.say(
            f"{self._name(last.fault)}: recovered after {last.recovery_s:.1f} s, at step {self.test_bed.observer.step}"
            + (f" ({notes})" if notes else "")
        )
        is_audit_due = last.fault.number % AUDIT_EVERY == 0 or any(
            PARTS[injected_fault.fault.kind] in AUDITED_PARTS for injected_fault in self._unrecovered
        )
        self._unrecovered.clear()
        self._look_at_groups(last.fault.number)
        if is_audit_due:
            self._audit(last.fault.number)

    def _has_recovered(self) -> bool:
        """Whether the run has recovered from all faults injected since the last recovery."""
        ended_s = 0.0
        for injected_fault in self._unrecovered:
            if injected_fault.ended_s is None:
                return False
            ended_s = max(ended_s, injected_fault.ended_s)
        if not self.test_bed.observer.has_recovered(self._unrecovered[-1].began_s, ended_s):
            return False
        return not any(
            injected_fault.needs_checkpoint for injected_fault in self._unrecovered
        ) or self._has_checkpoint_since(ended_s)

    def _has_checkpoint_since(self, ended_s: float) -> bool:
        readable = readable_checkpoints(self.test_bed.checkpoints)
        try:
            return bool(readable) and (readable[-1] / RECORD_FILE).stat().st_mtime > ended_s
        except FileNotFoundError:
            return False

    def _audit(self, number: int) -> None:
        launched = self.test_bed.launched
        self._report(run_audit(launched.run, launched.runs_folder, self.test_bed.redis.url), number)
        self.results.num_audits += 1

    def _look_at_groups(self, number: int) -> None:
        observer = self.test_bed.observer
        self._report(observer.group_checks.violations, number)
        self._report(
            stuck_groups(observer.client, self._prefix, self.test_bed.launched.folder, observer.ended_s), number
        )

    def _report(self, violations: Sequence[Violation], number: int) -> None:
        for violation in violations:
            if violation not in self.results.violations:
                self.results.violations[violation] = number
                self.say(f"VIOLATION: ticket {violation.ticket}: {violation.text}")

    def _end(self) -> None:
        """Stops the run as a user does, and continues it to the end with a number of steps that is now known.

        Before that it waits until a group that the last fault left stuck would be seen: a restart would resume it.
        """
        test_bed = self.test_bed
        seen_at = test_bed.observer.step + STUCK_AFTER_STEPS + CHECKPOINT_EVERY
        test_bed.wait_until(lambda: test_bed.observer.step > seen_at, RECOVERY_TIMEOUT_S, f"step {seen_at + 1}")
        self._look_at_groups(len(self.faults))
        test_bed.launched.ask_to_stop()
        self._await_end("the run to stop with a checkpoint")
        step = read_record(readable_checkpoints(test_bed.checkpoints)[-1]).step
        self.results.num_steps = max(MIN_STEPS, step + EXTRA_STEPS)
        self.say(f"stopped at step {step}, going on to the end at step {self.results.num_steps}")
        test_bed.launched.start(self.results.num_steps)
        self._await_end("the run to complete")
        self._audit(0)
        client = test_bed.observer.client
        evidence = gather(client, self._prefix, test_bed.launched.folder)
        self._report(check(evidence, self.results.num_steps, self.groups_per_step), 0)
        self._report(test_bed.observer.group_checks.violations, 0)
        self.results.dead = dead_tickets(client, self._prefix)

    def _await_end(self, what: str) -> None:
        launched = self.test_bed.launched
        self.test_bed.wait_until(lambda: not launched.is_running, END_TIMEOUT_S, what, is_launcher_needed=False)
        if launched.returncode != 0:
            raise self.test_bed.error(f"headrace up ended with {launched.returncode}; expected {what}")

    def _name(self, fault: Fault) -> str:
        return f"fault {fault.number} of {len(self.faults)}"
