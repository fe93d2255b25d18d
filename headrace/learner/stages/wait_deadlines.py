"""How long the loop waits for what others must do: each wait has a typed reason, which people see, and a deadline."""

from dataclasses import dataclass

from headrace.common.process.waiting import Reason, Waits
from headrace.learner.intake.intake import Intake
from headrace.learner.steering.live_config import InForce
from headrace.learner.steering.switches import Switches


class Starved(RuntimeError):
    """Nothing could be done for too long; the text says what was missing."""


@dataclass
class Patience:
    waits: Waits
    intake: Intake
    switches: Switches
    in_force: InForce

    def wait(self, reason: Reason, detail: str) -> float:
        """How long it has lasted. Raises `Starved` at the deadline."""
        deadline_s = self.in_force.config.learner.starvation_deadline_s
        lasted_s = self.waits.waiting(reason, detail, deadline_s)
        if lasted_s > deadline_s:
            raise Starved(f"{reason} for {lasted_s:.0f} s: {detail}")
        return lasted_s

    def wait_for_groups(self, reason: Reason) -> float:
        """As `wait`; but while learner or generation is paused, as ordered, no deadline comes nearer."""
        is_paused = self.switches.paused.is_set()
        if is_paused or self.intake.sight.is_generation_paused:
            self.waits.over(reason)
            return self.waits.waiting(Reason.PAUSED, "" if is_paused else "generation is scaled to 0 replicas")
        self.waits.over(Reason.PAUSED)
        return self.wait(reason, self.intake.why_waiting())

    def has_groups(self, reason: Reason) -> None:
        """They are there, or nobody waits for them any more."""
        self.waits.over(reason)
        self.waits.over(Reason.PAUSED)
