"""Polls the run twice a second and keeps the view from which every request is answered.

Neither requests nor open pages cost Redis anything. While Redis does not answer, the last view stays, and its verdict
says so. News since the previous poll is published to the open pages.
"""

import asyncio
import logging
import time
from typing import NamedTuple

import msgspec
import redis
from pydantic import BaseModel, ValidationError

from headrace.common.config import RunConfig
from headrace.common.redis.outage import server_message
from headrace.common.wire.desired_state import DesiredState
from headrace.control.models.replicas import Replicas
from headrace.control.models.status import Status
from headrace.control.polling.event_log import EventLog
from headrace.control.polling.group_samples import GroupSamples
from headrace.control.polling.history import RunHistory
from headrace.control.polling.learner_probe import LearnerProbe
from headrace.control.polling.redis_poll import PollResult, RedisPoller
from headrace.control.polling.run_counters import RunCounters
from headrace.control.verdict.input_collector import CheckInputCollector, int_field
from headrace.control.verdict.verdict import VerdictTracker, all_checks
from headrace.control.view.event_stream import Hub, message
from headrace.control.view.status_response import Assessment, replicas_response, status_response

POLL_INTERVAL_S = 0.5
POLL_DEADLINE_S = 2.0
PUBLISH_INTERVAL_S = 0.95
"""At most one status a second; slightly less, because polls are never quite on time."""
_log = logging.getLogger(__name__)


class RunView(NamedTuple):
    status: Status
    replicas: Replicas
    config: RunConfig
    """The configuration at the start of the run."""
    desired_state: DesiredState
    applied_version: int
    """The version of the settings that the learner has applied."""
    status_json: bytes
    replicas_json: bytes


class RunMonitor:
    """`view` is None until Redis has answered once."""

    def __init__(self, run: str, poller: RedisPoller, probe: LearnerProbe, hub: Hub, config: RunConfig) -> None:
        self.run = run
        self.poller = poller
        self.probe = probe
        self.hub = hub
        self.history = RunHistory()
        self.groups = GroupSamples()
        self.event_log = EventLog()
        self.view: RunView | None = None
        self.num_polls = 0
        """Polls of Redis so far."""
        self._config, self._config_json = config, b""
        self.latest_poll: PollResult | None = None
        """The latest successful poll."""
        self.counters = RunCounters()
        """Counts only rows and events that arrived after the first view."""
        self._collector = CheckInputCollector()
        self._verdict_tracker = VerdictTracker()
        self._polling = asyncio.Lock()
        self._was_unavailable = False
        self._published: dict[str, BaseModel] = {}
        self._published_at = 0.0

    async def follow(self) -> None:
        """Refreshes the view at a fixed interval, forever."""
        while True:
            started = time.monotonic()
            await self.refresh()
            await asyncio.sleep(max(0.0, POLL_INTERVAL_S - (time.monotonic() - started)))

    async def refresh(self) -> None:
        """Polls now. A caller that comes during a poll waits for one that begins afterwards."""
        async with self._polling:
            is_unavailable = False
            try:
                news = await self._read()
            except (redis.RedisError, OSError, TimeoutError) as error:
                news, is_unavailable = [], True
                if not self._was_unavailable:
                    _log.warning("Redis does not answer: %s", server_message(error))
            else:
                if self._was_unavailable:
                    _log.warning("Redis answers again")
            self._was_unavailable = is_unavailable
            self._update_view(is_unavailable)
            self._publish(news)

    async def _read(self) -> list[bytes]:
        """Polls until the streams are read; returns messages for the pages, none for what was there before control."""
        news: list[bytes] = []
        is_behind = True
        while is_behind:
            started = time.monotonic()
            async with asyncio.timeout(POLL_DEADLINE_S):
                self.latest_poll = poll = await self.poller.poll()
            self.num_polls += 1
            self.counters.observe_poll(time.monotonic() - started)
            news += self._apply(poll)
            is_behind = poll.is_behind
        return news if self.view is not None else []

    def _apply(self, poll: PollResult) -> list[bytes]:
        if poll.config is not None and poll.config != self._config_json:
            self._update_config(poll.config)
        self.probe.follow(poll.learner.get("url", ""))
        rows = [row for entry in poll.history if (row := self.history.add(entry))]
        events = [event for entry in poll.events if (event := self.event_log.add(entry))]
        if self.view is not None:
            self.counters.add(rows, events)
        news = [message(kind, _json(row)) for kind, row in rows]
        news += [message("group", _json(summary)) for entry in poll.samples if (summary := self.groups.add(entry))]
        return news + [message("event", _json(event)) for event in events]

    def _update_config(self, found: bytes) -> None:
        """A restarted learner may have written a new configuration; an unreadable one is ignored."""
        self._config_json = found
        try:
            self._config = RunConfig.model_validate_json(found)
        except ValidationError as error:
            _log.warning("the run's configuration in Redis cannot be read: %d problems", error.error_count())

    def _update_view(self, is_unavailable: bool) -> None:
        poll, now = self.latest_poll, time.time()
        if poll is None:
            return
        self._collector.replicas.add(poll.heartbeats, now)
        inputs = self._collector.inputs(poll, self._config, self.probe, self.history, is_unavailable, now)
        results = all_checks(inputs)
        assessment = Assessment(inputs, results, self._verdict_tracker.verdict(results, now))
        replicas = replicas_response(poll, self._collector.replicas, self.event_log)
        status = status_response(self.run, poll, assessment, replicas, self._config, self.history, self.probe, now)
        self.view = RunView(
            status=status,
            replicas=replicas,
            config=self._config,
            desired_state=poll.desired_state,
            applied_version=int_field(poll.learner, "settings_version"),
            status_json=_json(status),
            replicas_json=_json(replicas),
        )

    def _publish(self, news: list[bytes]) -> None:
        """Publishes news at once, and status and replicas if they have changed, at most once a second."""
        view, now = self.view, time.monotonic()
        if view is not None and now - self._published_at >= PUBLISH_INTERVAL_S:
            present: dict[str, tuple[BaseModel, bytes]] = {
                "status": (view.status.model_copy(update={"at": 0.0}), view.status_json),
                "replicas": (view.replicas, view.replicas_json),
            }
            for name, (model, payload) in present.items():
                if model != self._published.get(name):
                    self._published[name], self._published_at = model, now
                    news.append(message(name, payload))
        if news:
            self.hub.publish(b"".join(news))

    def initial_messages(self) -> list[bytes]:
        """The first messages to a new page."""
        if self.view is None:
            return []
        return [message("status", self.view.status_json), message("replicas", self.view.replicas_json)]


def _json(body: BaseModel | dict[str, float | None]) -> bytes:
    return body.model_dump_json().encode() if isinstance(body, BaseModel) else msgspec.json.encode(body)
