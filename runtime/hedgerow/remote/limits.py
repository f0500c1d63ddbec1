"""Whether one more request to a remote would be answered in the time that it has. Pure: no IO, no clock.

A limit is there to keep a remote from work that nobody will wait for, and callers from waiting in vain. It is not there
for a low latency, so no gradient of it sets the limit (as in Envoy's adaptive concurrency, or Netflix's Gradient2): in
an open loop requests come in bunches, latency is queueing, in this process too, and each bunch would look like an
overload. What is predicted instead is how long one more would take: by Little's law, as one of `n` in flight, `n` times
the remote's pace, which is the time between two of its answers, however many it works on at once. It is BBR's model of
a path, with requests in place of bytes, and the time that a caller has in place of a fixed gain.

An answer after `t` seconds to one of `k` in flight shows a pace of `t / k` at most: less if the remote could have
worked on more. So a quicker pace is always believed; a slower one only under pressure, when a request took, or was
expected to take, a good part of its time. One that was not answered in its time counts as if it had taken longer still:
thus a remote that became slow is backed off from as quickly as by halving.

Invariants, held by property tests: the limit stays within its bounds; more time never makes it lower; it never falls
without pressure. Held by simulations: nobody is refused at 80 % of what a remote can do; at three times of it what is
answered in time is what the remote can do; a limit that fell recovers in seconds; those who have too little time for
any answer cost the others none. Where callers have hardly more time than an answer takes, the limit comes down to
`least`: there is no room for the spread of the answers.
"""

from hedgerow.latency import BEYOND

WINDOW = 16
"""Requests to one step of the pace."""
SMOOTHING = 0.3
"""Share of a step that is taken at once."""
PROMPT = 0.8
"""Share of its time within which a request must be expected to be answered; the rest is for the spread of answers."""
PRESSURE = 0.5
"""The share of its time that a request takes, or is expected to, from which on it tells something of the load."""


class PaceLimit:
    """How many requests may be in flight for one more to be answered in time: from `least` to `most`.

    The pace is unknown, and the limit `most`, until there has been pressure. Times are in seconds.
    """

    def __init__(self, least: int, most: int) -> None:
        self._least = min(least, most)
        self._most = most
        self._pace_s = 0.0
        self._usual_s = 0.0
        self._outcomes = 0
        self._taken_s = 0.0
        self._inflight = 0
        self._pressed = False

    def allowed(self, time_s: float) -> int:
        """Requests that may be in flight with one that has `time_s`, itself included."""
        if not self._pace_s:
            return self._most
        return int(max(self._least, min(self._most, PROMPT * time_s / self._pace_s)))

    def expected_s(self, inflight: int) -> float:
        """How long a request is expected to take as one of `inflight`; 0 while that is unknown."""
        return inflight * self._pace_s

    def answered(self, took_s: float, inflight: int, time_s: float) -> None:
        """Count an answer after `took_s` to a request that had `time_s` and was one of `inflight` when it was sent."""
        self._pressed |= max(took_s, self.expected_s(inflight)) >= PRESSURE * time_s
        self._outcomes += 1
        self._taken_s += took_s
        self._inflight += inflight
        if self._outcomes >= WINDOW:
            self._step()

    def missed(self, waited_s: float, inflight: int, time_s: float) -> None:
        """Count a request whose answer nobody waited for any longer after `waited_s`; the rest as in `answered`.

        Who leaves sooner than answers usually come has seen nothing of the remote.
        """
        self.answered(max(BEYOND * waited_s, self._usual_s), inflight, time_s)

    def _step(self) -> None:
        pace_s = self._taken_s / self._inflight
        if not self._pace_s:
            self._pace_s = pace_s if self._pressed else 0.0
        elif self._pressed or pace_s < self._pace_s:
            self._pace_s += SMOOTHING * (pace_s - self._pace_s)
        self._usual_s = self._taken_s / self._outcomes
        self._outcomes, self._taken_s, self._inflight, self._pressed = 0, 0.0, 0, False
