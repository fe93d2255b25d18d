"""The configuration that counts: as the run was started, with what was ordered since, with what the guard tightened."""

import logging
from collections.abc import Mapping
from typing import Any

from headrace.common.config import RunConfig
from headrace.common.config.hot_reload import with_settings
from headrace.common.wire.desired_state import Settings
from headrace.learner.algorithm.guard import Decision, GuardState, decide, held_back, tightened

_log = logging.getLogger(__name__)


class InForce:
    """Raises `ValueError` if the settings are impossible."""

    ordered: RunConfig
    """With the settings, before the guard."""
    config: RunConfig
    """As it counts now."""

    def __init__(self, configured: RunConfig, settings: Settings, guard: GuardState) -> None:
        self.configured = configured
        self.guard = guard
        self.change(settings)

    def change(self, settings: Settings) -> None:
        """Raises `ValueError` if they are impossible, and changes nothing then."""
        self.ordered = with_settings(self.configured, settings.values)
        self.settings = settings
        self.config = tightened(self.ordered, self.guard)

    def look_after(self, row: Mapping[str, Any]) -> Decision:
        """The guard may tighten the steps after the one that `row` is of, or loosen them again."""
        decision = decide(self.guard, row, self.ordered)
        is_moved = decision.state.notch != self.guard.notch
        self.guard = decision.state
        if is_moved:
            self.config = tightened(self.ordered, self.guard)
        return decision

    @property
    def held_back(self) -> str:
        """What the guard has tightened, for people; empty where nothing."""
        return held_back(self.ordered, self.config)


def take_up(
    configured: RunConfig, ordered: Settings, recorded: Settings, guard: GuardState
) -> tuple[InForce, Settings]:
    """What counts at a start, and the settings that are to stand in Redis.

    `ordered` stands in Redis, `recorded` in the checkpoint: the higher version counts, Redis's where they are equal.
    What has become impossible gives way to the other, and at last to what is configured.
    """
    standing = ordered if ordered.version >= recorded.version else recorded
    for settings in (standing, recorded):
        try:
            return InForce(configured, settings, guard), standing
        except ValueError as error:
            _log.error("settings of version %d are refused: %s", settings.version, error)
    return InForce(configured, Settings(), guard), standing
