"""The configuration that applies now: the recipe's, with the settings changed since, as the guard has tightened it."""

import logging
from collections.abc import Mapping
from typing import Any

from headrace.common.config import RunConfig
from headrace.common.config.hot_reload import with_settings
from headrace.common.wire.desired_state import Settings
from headrace.learner.algorithm.guard import Decision, GuardState, apply_guard, decide, describe_overrides

_log = logging.getLogger(__name__)


class LiveConfig:
    """Raises `ValueError` if the settings are impossible."""

    before_guard: RunConfig
    """With the settings, without the guard's changes."""
    config: RunConfig
    """The one that applies now."""

    def __init__(self, configured: RunConfig, settings: Settings, guard: GuardState) -> None:
        self.configured = configured
        self.guard = guard
        self.apply_settings(settings)

    def apply_settings(self, settings: Settings) -> None:
        """Raises `ValueError`, and changes nothing, if they are impossible."""
        self.before_guard = with_settings(self.configured, settings.values)
        self.settings = settings
        self.config = apply_guard(self.before_guard, self.guard)

    def update_guard(self, row: Mapping[str, Any]) -> Decision:
        """Lets the guard tighten or loosen the steps after the one of `row`, a row of step metrics."""
        decision = decide(self.guard, row, self.before_guard)
        is_moved = decision.state.level != self.guard.level
        self.guard = decision.state
        if is_moved:
            self.config = apply_guard(self.before_guard, self.guard)
        return decision

    @property
    def guard_overrides(self) -> str:
        """The settings that the guard has tightened, for people; empty if there are none."""
        return describe_overrides(self.before_guard, self.config)


def resume_config(
    configured: RunConfig, in_redis: Settings, in_checkpoint: Settings, guard: GuardState
) -> tuple[LiveConfig, Settings]:
    """Returns the effective configuration at start-up, and the settings to write to Redis.

    Of the settings in Redis and in the checkpoint those of the higher version apply, Redis's if they are equal. If they
    are impossible, the checkpoint's apply, and if those are too, the configuration alone.
    """
    newest = in_redis if in_redis.version >= in_checkpoint.version else in_checkpoint
    for settings in (newest, in_checkpoint):
        try:
            return LiveConfig(configured, settings, guard), newest
        except ValueError as error:
            _log.error("settings of version %d are refused: %s", settings.version, error)
    return LiveConfig(configured, Settings(), guard), newest
