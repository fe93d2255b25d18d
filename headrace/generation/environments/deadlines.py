"""The deadlines of one episode: for the environment between two requests, and for the whole."""

import time
from collections.abc import Callable

from headrace.common.config.environment import EnvironmentConfig


class EpisodeDeadlines:
    """Begins with the episode. `environment_s` returns for how many seconds no request of the episode has been under
    way, 0 while one is: as the gateway sees it, so that agents with a client of their own have the same deadline."""

    def __init__(self, settings: EnvironmentConfig, environment_s: Callable[[], float]) -> None:
        self._settings = settings
        self._environment_s = environment_s
        self._began_s = time.monotonic()

    def left_s(self) -> float:
        """Seconds until one of the deadlines may have passed."""
        settings, (episode_s, turn_s) = self._settings, self._elapsed_s()
        return max(0.0, min(settings.episode_deadline_s - episode_s, settings.turn_deadline_s - turn_s))

    def problem(self) -> str:
        """The deadline that has passed; empty if none has."""
        settings, (episode_s, turn_s) = self._settings, self._elapsed_s()
        if episode_s >= settings.episode_deadline_s:
            return f"it did not end within environment.episode_deadline_s {settings.episode_deadline_s:g}"
        if turn_s >= settings.turn_deadline_s:
            return (
                "its environment neither asked for a reply nor ended within environment.turn_deadline_s "
                f"{settings.turn_deadline_s:g}"
            )
        return ""

    def _elapsed_s(self) -> tuple[float, float]:
        episode_s = time.monotonic() - self._began_s
        return episode_s, min(episode_s, self._environment_s())
