"""Which calls are not worth beginning, by how late the event loop is.

Where a model takes microseconds, the event loop is what overload meets first. Calls grow old there before anybody has
looked at them, and to refuse one that was parsed and queued costs half of answering it. So load is shed as calls open,
by nothing but their headers: those are refused that could not be answered within their deadlines, whoever is patient
waits.
"""

import asyncio

from hedgerow.lifecycle import InFlight

CALM = 64
"""Calls open, over all connections, that are never too many; the loop is watched while there are more."""
LOOK_S = 0.02
"""How often the event loop is asked how late it is."""
GRAIN_S = 0.001
"""How late timers are on a loop that has nothing to do: they are set in whole milliseconds."""
GAIN = 0.2
"""Weight of the latest look in what is remembered."""
MAX_LEAP = 2.0
"""Times as many calls as of late that make the loop so much later: many that have come may be waiting for something
else."""
TURNS = 16
"""Times that a call may meet how late the loop is: unseen in the socket, in each step of its way, and on its way out.
Nearly all calls that are let in then get their answer within half of their deadline."""


class Shedding:
    """Watches the event loop that it belongs to while more than `CALM` of `calls` are open."""

    def __init__(self, calls: InFlight) -> None:
        self.refused = 0
        self._calls = calls
        self._late_s = 0.0
        """How late the event loop was of late, and"""
        self._open = 1.0
        """how many calls were open then: what comes on top makes it so much later."""
        self._looked = 0.0
        """When it was looked last."""
        self._timer: asyncio.TimerHandle | None = None

    def refuses(self, timeout_s: float) -> bool:
        """Whether a call that opens and has `timeout_s` comes in vain; counts it then, and has the loop watched."""
        count = self._calls.count
        if count <= CALM:
            return False
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self.forget(loop.time() - self._looked)
            self._watch(loop)
        if TURNS * self._late_s * min(count, MAX_LEAP * self._open) <= timeout_s * self._open:
            return False
        self.refused += 1
        return True

    def look(self, late_s: float) -> None:
        """The event loop was `late_s` late."""
        self._late_s += GAIN * (late_s - self._late_s)
        self._open += GAIN * (self._calls.count - self._open)

    def forget(self, calm_s: float) -> None:
        """For `calm_s` nobody has looked, because there was no crowd: as if the loop had been in time."""
        self._late_s *= (1 - GAIN) ** (calm_s / LOOK_S)

    def close(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + LOOK_S

        def look() -> None:
            self._timer = None
            self._looked = loop.time()
            self.look(max(0.0, self._looked - due - GRAIN_S))
            if self._calls.count > CALM:
                self._watch(loop)

        self._timer = loop.call_at(due, look)
