"""The one picture of the run that every reader is answered from: looked at twice a second, whoever asks.

Neither requests nor connected pages cost Redis anything. While Redis is away the last good picture stands, and its
verdict says so. What is new since the look before goes to the pages that follow.
"""

import asyncio
import logging
import time
from typing import NamedTuple

import msgspec
import redis
from pydantic import BaseModel, ValidationError

from headrace.common.config import RunConfig
from headrace.common.redis.retry import words_of
from headrace.common.wire.desired_state import Orders
from headrace.control.models import Replicas, Status
from headrace.control.polling.event_log import Happenings
from headrace.control.polling.group_samples import RunGroups
from headrace.control.polling.history import RunHistory
from headrace.control.polling.learner_probe import LearnerProbe
from headrace.control.polling.redis_poll import Look, RunReader
from headrace.control.polling.run_counters import Tally
from headrace.control.verdict.input_collector import FactFinder, number_of
from headrace.control.verdict.verdict import Judge, findings_of
from headrace.control.view.event_stream import Hub, message
from headrace.control.view.status_response import Judged, replicas_of, status_of

LOOK_INTERVAL_S = 0.5
LOOK_DEADLINE_S = 2.0
PUBLISH_INTERVAL_S = 0.95
"""At most one status a second, by looks twice a second that are never quite on time."""
_log = logging.getLogger(__name__)


class Picture(NamedTuple):
    status: Status
    replicas: Replicas
    config: RunConfig
    """As it started."""
    orders: Orders
    applied_version: int
    """Of the settings."""
    status_json: bytes
    replicas_json: bytes


class Snapshot:
    """`picture` is None until Redis has answered once; the rest only grows."""

    def __init__(self, run: str, reader: RunReader, probe: LearnerProbe, hub: Hub, config: RunConfig) -> None:
        self.run = run
        self.reader = reader
        self.probe = probe
        self.hub = hub
        self.history = RunHistory()
        self.groups = RunGroups()
        self.happenings = Happenings()
        self.picture: Picture | None = None
        self.num_looks = 0
        """At Redis, ever."""
        self._config, self._config_json = config, b""
        self.look: Look | None = None
        """The newest that Redis has answered."""
        self.tally = Tally()
        """Of what is new since `picture` was first drawn."""
        self._finder = FactFinder()
        self._judge = Judge()
        self._looking = asyncio.Lock()
        self._is_away_told = False
        self._published: dict[str, BaseModel] = {}
        self._published_at = 0.0

    async def follow(self) -> None:
        """For ever."""
        while True:
            started = time.monotonic()
            await self.refresh()
            await asyncio.sleep(max(0.0, LOOK_INTERVAL_S - (time.monotonic() - started)))

    async def refresh(self) -> None:
        """Looks now. Who comes while somebody looks waits for a look that begins after."""
        async with self._looking:
            is_away = False
            try:
                news = await self._read()
            except (redis.RedisError, OSError, TimeoutError) as error:
                news, is_away = [], True
                if not self._is_away_told:
                    _log.warning("Redis does not answer: %s", words_of(error))
            else:
                if self._is_away_told:
                    _log.warning("Redis answers again")
            self._is_away_told = is_away
            self._draw(is_away)
            self._publish(news)

    async def _read(self) -> list[bytes]:
        """Messages of what is new; what was there before control is none."""
        news: list[bytes] = []
        is_behind = True
        while is_behind:
            started = time.monotonic()
            async with asyncio.timeout(LOOK_DEADLINE_S):
                self.look = look = await self.reader.look()
            self.num_looks += 1
            self.tally.looked(time.monotonic() - started)
            news += self._take(look)
            is_behind = look.is_behind
        return news if self.picture is not None else []

    def _take(self, look: Look) -> list[bytes]:
        if look.config is not None and look.config != self._config_json:
            self._take_config(look.config)
        self.probe.follow(look.learner.get("url", ""))
        rows = [told for entry in look.history if (told := self.history.take(entry))]
        events = [event for entry in look.events if (event := self.happenings.take(entry))]
        if self.picture is not None:
            self.tally.take(rows, events)
        news = [message(kind, _json(row)) for kind, row in rows]
        news += [message("group", _json(summary)) for entry in look.shown if (summary := self.groups.take(entry))]
        return news + [message("event", _json(event)) for event in events]

    def _take_config(self, found: bytes) -> None:
        """Of a learner that has begun the run anew; one that cannot be read leaves the one before."""
        self._config_json = found
        try:
            self._config = RunConfig.model_validate_json(found)
        except ValidationError as error:
            _log.warning("the run's configuration in Redis cannot be read: %d problems", error.error_count())

    def _draw(self, is_away: bool) -> None:
        look, now = self.look, time.time()
        if look is None:
            return
        self._finder.replicas.take(look.heartbeats, now)
        facts = self._finder.facts(look, self._config, self.probe, self.history, is_away, now)
        findings = findings_of(facts)
        judged = Judged(facts, findings, self._judge.verdict(findings, now))
        replicas = replicas_of(look, self._finder.replicas, self.happenings)
        status = status_of(self.run, look, judged, replicas, self._config, self.history, self.probe, now)
        self.picture = Picture(
            status=status,
            replicas=replicas,
            config=self._config,
            orders=look.orders,
            applied_version=number_of(look.learner, "settings_version"),
            status_json=_json(status),
            replicas_json=_json(replicas),
        )

    def _publish(self, news: list[bytes]) -> None:
        """What is new at once; status and replicas when they have changed, at most once a second."""
        picture, now = self.picture, time.monotonic()
        if picture is not None and now - self._published_at >= PUBLISH_INTERVAL_S:
            told: dict[str, tuple[BaseModel, bytes]] = {
                "status": (picture.status.model_copy(update={"at": 0.0}), picture.status_json),
                "replicas": (picture.replicas, picture.replicas_json),
            }
            for name, (model, payload) in told.items():
                if model != self._published.get(name):
                    self._published[name], self._published_at = model, now
                    news.append(message(name, payload))
        if news:
            self.hub.publish(b"".join(news))

    def first_messages(self) -> list[bytes]:
        """What a page is told when it comes."""
        if self.picture is None:
            return []
        return [message("status", self.picture.status_json), message("replicas", self.picture.replicas_json)]


def _json(told: BaseModel | dict[str, float | None]) -> bytes:
    return told.model_dump_json().encode() if isinstance(told, BaseModel) else msgspec.json.encode(told)
