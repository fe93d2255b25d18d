"""How long the loop waits for other services: each wait has a typed reason, which people see, and a deadline."""

from dataclasses import dataclass

from headrace.common.process.waiting import Reason, Waits
from headrace.learner.intake.intake import Intake
from headrace.learner.steering.live_config import LiveConfig
from headrace.learner.steering.switches import Switches


class Starved(RuntimeError):
    """The learner could do nothing for too long; the text says what was missing."""


@dataclass
class WaitDeadlines:
    waits: Waits
    intake: Intake
    switches: Switches
    live_config: LiveConfig

    def note_wait(self, reason: Reason, detail: str) -> float:
        """Notes that the wait goes on, and returns its duration in seconds. Raises `Starved` after the deadline."""
        deadline_s = self.live_config.config.learner.starvation_deadline_s
        lasted_s = self.waits.note(reason, detail, deadline_s)
        if lasted_s > deadline_s:
            raise Starved(f"{reason.text} for {lasted_s:.0f} s: {detail}")
        return lasted_s

    def note_group_wait(self, reason: Reason) -> float:
        """As `note_wait`, but the deadline does not apply while learner or generation is paused on request."""
        is_paused = self.switches.paused.is_set()
        if is_paused or self.intake.control_state.is_generation_paused:
            self.waits.end(reason)
            return self.waits.note(Reason.PAUSED, "" if is_paused else "generation is scaled to 0 replicas")
        self.waits.end(Reason.PAUSED)
        return self.note_wait(reason, self.intake.describe_wait())

    def end_group_wait(self, reason: Reason) -> None:
        """The groups have arrived, or the loop waits for them no longer."""
        self.waits.end(reason)
        self.waits.end(Reason.PAUSED)
