"""The Prometheus metrics at control's `/metrics`: of the whole run, and of control itself.

Scraping control alone is enough for the alerts and the dashboard under deploy/. A scrape reads memory only: it costs
Redis nothing, and works while Redis does not answer.
"""

from headrace.common.metrics.families import Families
from headrace.common.metrics.replicas import add_learner_waits, add_replica, add_replica_states, add_replica_waits
from headrace.common.metrics.run import add_desired_state, add_files, add_progress, add_queues
from headrace.common.metrics.steps import add_latest_evaluation, add_latest_step
from headrace.common.process.waiting import decode_waits
from headrace.control.http.request_counts import RequestTotals
from headrace.control.models.replicas import Replicas
from headrace.control.models.status import Queues, Status
from headrace.control.polling.redis_poll import PollResult
from headrace.control.verdict.check_inputs import FINAL_PHASES
from headrace.control.view.run_monitor import RunMonitor

LEVELS = {"healthy": 0, "ended": 0, "waiting": 1, "warning": 2, "critical": 3}


class ControlMetrics:
    """Call it for each scrape, in control's event loop."""

    def __init__(self, monitor: RunMonitor, requests: RequestTotals) -> None:
        self._monitor = monitor
        self._requests = requests

    def __call__(self) -> Families:
        monitor, families = self._monitor, Families(run=self._monitor.run)
        if monitor.view is not None and monitor.latest_poll is not None:
            status = monitor.view.status
            self._add_run(families, status, monitor.latest_poll)
            _add_verdict(families, status)
            _add_rates(families, status)
            _add_queues(families, status.queues)
            _add_replicas(families, monitor.latest_poll, monitor.view.replicas)
            monitor.counters.groups.collect(families, dict(status.counts) | {"dead": status.counts.dead_letters})
        monitor.counters.collect(families)
        self._requests.collect(families)
        self._add_control(families)
        return families

    def _add_run(self, families: Families, status: Status, poll: PollResult) -> None:
        history, probe = self._monitor.history, self._monitor.probe
        add_progress(
            families,
            phase=status.phase,
            step=status.step,
            target_steps=status.target_steps,
            weight_version=status.weight_version,
            fencing_epoch=status.fencing_epoch,
        )
        replicas = status.replicas
        applied = self._monitor.view.applied_version if self._monitor.view else None
        add_desired_state(families, desired=replicas.desired, advised=replicas.advised, settings_version=applied)
        families.gauge("headrace_paused", "1 while the run is paused on request.", status.is_paused)
        families.gauge("headrace_stopping", "1 while the run is stopping on request.", status.is_stopping)
        if len(history):
            add_latest_step(families, history.row(len(history) - 1))
        if status.latest_evaluation is not None:
            found = status.latest_evaluation
            row = found.model_dump(exclude={"pass_at", "weight_version"}) | {
                f"pass_at_{k}": share for k, share in found.pass_at.items()
            }
            add_latest_evaluation(families, row)
            best = max(evaluation.held_out for evaluation in history.evaluations)
            families.gauge("headrace_eval_held_out_best", "pass@1 of the best evaluation.", best)
        fields = {name: poll.learner.get(f"checkpoint_{name}") for name in ("step", "time_s", "seconds", "bytes")}
        add_files(families, {name: float(text) for name, text in fields.items() if text and _is_number(text)}, {})
        is_answering = probe.is_answering and probe.status is not None
        waits = {wait.reason: wait.for_s for wait in probe.status.waits} if is_answering and probe.status else {}
        add_learner_waits(families, waits or decode_waits(poll.learner.get("waits", "")))
        silent_s = 0.0 if status.phase in FINAL_PHASES else probe.silent_s
        families.gauge("headrace_learner_silent_seconds", "Since the learner last answered control.", silent_s)

    def _add_control(self, families: Families) -> None:
        monitor, hub = self._monitor, self._monitor.hub
        families.gauge("headrace_control_subscribers", "Pages that follow.", hub.num_subscribers)
        text = "Pages that fell behind and were dropped."
        families.counter("headrace_control_dropped_subscribers_total", text, hub.num_dropped)
        text = "Bytes published to the pages, each counted once."
        families.counter("headrace_control_published_bytes_total", text, hub.num_published_bytes)
        families.counter("headrace_control_polls_total", "Polls of Redis.", monitor.num_polls)
        text = "Commands sent to Redis by polls."
        families.counter("headrace_control_redis_commands_total", text, monitor.poller.num_commands)


def _add_verdict(families: Families, status: Status) -> None:
    text = "1 for how the run is."
    families.state_set("headrace_verdict", text, "level", LEVELS, status.verdict.level)
    families.gauge("headrace_verdict_since_timestamp_seconds", "Since when it is so.", status.verdict.since_at)
    for check in status.checks:
        text = "How bad one thing is: 0 healthy, 1 waiting, 2 warning, 3 critical."
        families.gauge("headrace_check_level", text, LEVELS[check.level], check=check.name)
        text = "What the check is about; of a metric the median of the last 5 steps."
        families.gauge("headrace_check_value", text, check.value, check=check.name)
        families.gauge("headrace_check_warning", "The value from which it is a warning.", check.warn, check=check.name)
        families.gauge("headrace_check_alarm", "The value from which it is critical.", check.alarm, check=check.name)


def _add_rates(families: Families, status: Status) -> None:
    """The rates that the page shows, over the last steps; rates over other windows follow from the counters."""
    rates = status.rates
    families.gauge("headrace_steps_per_hour", "Pace of the last steps.", rates.steps_per_hour)
    text = "Share of its time that the learner waited for groups, over the last steps."
    families.gauge("headrace_learner_idle_share", text, rates.learner_idle_share)
    text = "Share of their time that replicas waited for tickets, over the last half minute."
    families.gauge("headrace_replicas_idle_share", text, rates.replicas_idle_share)
    text = "Tokens of groups per second, over the last steps."
    families.gauge("headrace_generated_tokens_per_second", text, rates.generated_tokens_per_s)
    text = "Trained tokens per second, over the last steps."
    families.gauge("headrace_trained_tokens_per_second", text, rates.trained_tokens_per_s)
    families.gauge("headrace_remaining_seconds", "Until the last step, at that pace.", status.remaining_s)


def _add_queues(families: Families, queues: Queues) -> None:
    add_queues(
        families,
        open_tickets=queues.open_tickets,
        stream_length=queues.group_stream_length,
        unread=queues.unread_groups,
    )
    families.gauge("headrace_leased_tickets", "Open training tickets that a replica holds.", queues.leased_tickets)
    families.gauge("headrace_evaluation_tickets", "Evaluation tickets not yet answered.", queues.evaluation_tickets)
    families.gauge("headrace_dead_letters", "Entries of the stream of dead letters.", queues.dead_letters)


def _add_replicas(families: Families, poll: PollResult, shown: Replicas) -> None:
    add_replica_states(families, poll.heartbeats)
    for beat in poll.heartbeats:
        add_replica(families, beat)
        add_replica_waits(families, beat.replica, beat.waits)
    for replica in shown.replicas:
        text = "Published versions that it does not serve yet."
        families.gauge("headrace_replica_versions_behind", text, replica.versions_behind, replica=replica.id)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
