"""The responses of `/status` and `/replicas`, from a poll and the results of the checks. Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from headrace.common.config import RunConfig
from headrace.common.process.waiting import decode_waits
from headrace.control.models.replicas import Replica, ReplicaCounts, Replicas
from headrace.control.models.status import Counts, Queues, Rates, Staleness, Status, Verdict, Wait
from headrace.control.polling.event_log import EventLog
from headrace.control.polling.history import RunHistory
from headrace.control.polling.learner_probe import LearnerProbe, LearnerWait
from headrace.control.polling.redis_poll import PollResult
from headrace.control.verdict.check_inputs import FINAL_PHASES, CheckInputs, CheckResult
from headrace.control.verdict.input_collector import ReplicaTracker, int_field

RATE_STEPS = 20


class Assessment(NamedTuple):
    inputs: CheckInputs
    results: Sequence[CheckResult]
    verdict: Verdict


def status_response(
    run: str,
    poll: PollResult,
    assessment: Assessment,
    replicas: Replicas,
    config: RunConfig,
    history: RunHistory,
    probe: LearnerProbe,
    now: float,
) -> Status:
    inputs, evaluations = assessment.inputs, history.evaluations
    rates = _rates(history, replicas)
    return Status(
        run=run,
        at=now,
        verdict=assessment.verdict,
        checks=[check_result.check for check_result in assessment.results],
        phase=inputs.phase or "loading the model",
        reason=inputs.reason,
        is_paused=inputs.is_paused,
        is_stopping=inputs.is_stopping,
        step=inputs.step,
        target_steps=inputs.steps,
        weight_version=int_field(poll.learner, "weight_version"),
        fencing_epoch=poll.epoch,
        wall_s=_latest(history, "wall_s"),
        remaining_s=_remaining_s(inputs, rates),
        sampled_reward_mean=_latest(history, "sampled_reward_mean"),
        latest_evaluation=evaluations[-1] if evaluations else None,
        staleness=Staleness(
            mean=_latest(history, "staleness_mean"),
            max=_latest(history, "staleness_max"),
            in_flight=_latest(history, "staleness_in_flight_mean"),
            in_queue=_latest(history, "staleness_in_queue_mean"),
        ),
        rates=rates,
        queues=_queues(poll.queues, probe),
        counts=_counts(poll, config, history, probe),
        replicas=replicas.counts,
        waits=_waits(poll, probe),
        settings_version=poll.desired_state.settings.version,
    )


def replicas_response(poll: PollResult, tracker: ReplicaTracker, event_log: EventLog) -> Replicas:
    version = int_field(poll.learner, "weight_version")
    found = []
    for beat in poll.heartbeats:
        rates = tracker.rates(beat.replica)
        found.append(
            Replica(
                id=beat.replica,
                url=beat.url,
                state=beat.state,
                reason=beat.reason,
                weight_version=beat.weight_version,
                versions_behind=max(0, version - beat.weight_version),
                groups_in_flight=beat.groups_in_flight,
                groups_committed=beat.groups_committed,
                tokens_generated=beat.tokens_generated,
                tokens_per_s=rates.tokens_per_s,
                idle_share=rates.idle_share,
                swap_pauses=event_log.pauses(beat.replica),
                seen_since_at=tracker.seen_since_at.get(beat.replica, 0.0),
            )
        )
    counts = ReplicaCounts(
        live=len(found),
        running=sum(replica.state == "running" for replica in found),
        desired=poll.desired_state.desired_replicas,
        advised=int_field(poll.learner, "advised_replicas") if "advised_replicas" in poll.learner else None,
        advice=poll.learner.get("advice", ""),
        launcher=poll.launcher,
    )
    return Replicas(replicas=found, counts=counts)


def _latest(history: RunHistory, name: str) -> float | None:
    values = history.latest(name, 1)
    return values[-1] if values else None


def _rates(history: RunHistory, replicas: Replicas) -> Rates:
    shares = [replica.idle_share for replica in replicas.replicas if replica.idle_share is not None]
    idle_share = sum(shares) / len(shares) if shares else None
    wall_s, generated = history.latest("wall_s", RATE_STEPS), history.latest("run_generated_tokens", RATE_STEPS)
    count = len(wall_s) - 1
    if count < 1 or wall_s[-1] <= wall_s[0]:
        return Rates(replicas_idle_share=idle_share)
    took_s = wall_s[-1] - wall_s[0]
    waited_s, trained = history.latest("wait_s", count), history.latest("batch_tokens", count)
    return Rates(
        generated_tokens_per_s=(generated[-1] - generated[0]) / took_s if len(generated) > 1 else None,
        trained_tokens_per_s=sum(trained) / took_s if trained else None,
        steps_per_hour=3600 * count / took_s,
        learner_idle_share=min(1.0, sum(waited_s) / took_s) if waited_s else None,
        replicas_idle_share=idle_share,
    )


def _remaining_s(inputs: CheckInputs, rates: Rates) -> float | None:
    if inputs.phase in FINAL_PHASES:
        return 0.0 if inputs.phase == "finished" else None
    if not rates.steps_per_hour:
        return None
    return max(0, inputs.steps - inputs.step) * 3600 / rates.steps_per_hour


def _queues(queues: Queues, probe: LearnerProbe) -> Queues:
    """A learner that does not answer reads nothing, so groups that came since its last answer are unread."""
    learner = probe.status
    if learner is None or learner.unread_groups is None:
        return queues
    unread = learner.unread_groups
    if not probe.is_answering:
        unread += queues.group_stream_length - learner.group_stream_length
    return queues.model_copy(update={"unread_groups": max(0, unread)})


def _counts(poll: PollResult, config: RunConfig, history: RunHistory, probe: LearnerProbe) -> Counts:
    """The learner's own counts; without an answer of the learner, an estimate from its last row."""
    generated = int(_latest(history, "run_generated_tokens") or 0)
    if probe.status is not None:
        known = {name: max(0, count) for name, count in probe.status.counts.items() if name in Counts.model_fields}
        return Counts(**({"generated_tokens": generated} | known | {"dead_letters": poll.queues.dead_letters}))
    trained = int_field(poll.learner, "step") * config.learner.groups_per_step
    uniform, stale = _latest(history, "run_uniform_share") or 0.0, _latest(history, "run_stale_share") or 0.0
    decided = trained / (1 - uniform - stale) if uniform + stale < 1 else 0.0
    return Counts(
        trained=trained,
        uniform=round(uniform * decided),
        stale=round(stale * decided),
        evaluated=0,
        dead_letters=poll.queues.dead_letters,
        generated_tokens=generated,
    )


def _waits(poll: PollResult, probe: LearnerProbe) -> list[Wait]:
    if probe.is_answering and probe.status is not None:
        found = [_learner_wait(wait) for wait in probe.status.waits]
    else:
        learner = poll.learner
        found = _component_wait("learner", learner.get("reason", ""), decode_waits(learner.get("waits", "")))
    for beat in poll.heartbeats:
        found += _component_wait(beat.replica, beat.reason, beat.waits)
    return found


def _learner_wait(wait: LearnerWait) -> Wait:
    text = f"{wait.text or wait.reason}{': ' if wait.detail else ''}{wait.detail} for {wait.for_s:.0f} s"
    return Wait(component="learner", reason=wait.reason, text=text, for_s=wait.for_s)


def _component_wait(component: str, text: str, waits: Mapping[str, float]) -> list[Wait]:
    """`waits`: seconds by reason, the longest first; that one names the whole text."""
    reason, for_s = next(iter(waits.items()), ("", 0.0))
    return [Wait(component=component, reason=reason, text=text, for_s=for_s)] if text else []
