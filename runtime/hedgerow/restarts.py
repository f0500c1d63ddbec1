"""When a process that keeps ending is started again: after growing pauses, and not for ever. Pure: no clock, no IO.

- the pause before a restart doubles with each end within `window_s`;
- after more than `max_restarts` ends within `window_s` it is given up for `cool_down_s`;
- once it runs after that, what was before is forgotten.
"""

import collections

from hedgerow.config import Count, Seconds, Settings


class RestartSettings(Settings, frozen=True, kw_only=True):
    """How often, and how fast, a process is started again."""

    backoff_s: Seconds = 0.1
    """Before the first restart."""
    max_backoff_s: Seconds = 10.0
    max_restarts: Count = 5
    window_s: Seconds = 60.0
    cool_down_s: Seconds = 60.0


class Restarts:
    """The ends of one process, and what follows from them. Times are seconds of any one clock."""

    def __init__(self, settings: RestartSettings) -> None:
        self._settings = settings
        self._ends: collections.deque[float] = collections.deque(maxlen=settings.max_restarts + 1)
        self.given_up = False
        """Whether it has ended too often, and has not run since."""

    def ended(self, now: float) -> float:
        """It has ended; the time at which to start it again."""
        self._ends.append(now)
        recent = sum(now - end <= self._settings.window_s for end in self._ends)
        self.given_up = self.given_up or recent > self._settings.max_restarts
        if self.given_up:
            return now + self._settings.cool_down_s
        return now + min(self._settings.max_backoff_s, self._settings.backoff_s * 2.0 ** (recent - 1))

    def started(self) -> None:
        """It runs."""
        if self.given_up:
            self._ends.clear()
            self.given_up = False
