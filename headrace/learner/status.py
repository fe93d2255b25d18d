"""The reply of the learner's `/status`."""

from typing import Any


def learner_status(loop: Any, run: str) -> dict[str, Any]:
    """`loop`: a `Loop`. Reads memory alone, so it never waits for the loop or Redis."""
    progress = loop.progress
    return {
        "service": "learner",
        "run": run,
        "phase": "paused" if loop.switches.paused.is_set() else progress.phase,
        "reason": loop.waits.describe(),
        "waits": loop.waits.status(),
        "step": progress.step,
        "target_steps": loop.config.learner.steps,
        "weight_version": loop.versions.current,
        "fencing_epoch": loop.store.epoch,
        "desired_replicas": loop.intake.control_state.desired_state.desired_replicas,
        "advised_replicas": loop.reporter.adviser.advice.replicas,
        "advice": loop.reporter.adviser.advice.reason,
        "settings_version": loop.live_config.settings.version,
        "unpersisted_commands": [" ".join(map(str, command)) for command in loop.switches.unpersisted],
        "group_stream_length": loop.intake.queue.in_stream,
        "unread_groups": loop.intake.num_unread,
        "counts": dict(loop.intake.settlement_log.counts),
        "latest": progress.latest,
    }
