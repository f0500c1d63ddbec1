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
GAIN = 0.2
"""Weight of the latest look in what is remembered."""
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
        self._timer: asyncio.TimerHandle | None = None

    def refuses(self, timeout_s: float) -> bool:
        """Whether a call that has `timeout_s` comes in vain; counts it then."""
        count = self._calls.count
        if count <= CALM:
            return False
        if self._timer is None:
            self._watch()
        if TURNS * self._late_s * count <= timeout_s * self._open:
            return False
        self.refused += 1
        return True

    def look(self, late_s: float) -> None:
        """The event loop was `late_s` late."""
        self._late_s += GAIN * (late_s - self._late_s)
        self._open += GAIN * (self._calls.count - self._open)

    def close(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + LOOK_S

        def look() -> None:
            self._timer = None
            self.look(loop.time() - due)
            if self._calls.count > CALM:
                self._watch()

        self._timer = loop.call_at(due, look)
