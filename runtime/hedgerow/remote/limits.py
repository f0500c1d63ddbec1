"""How many requests a remote may have in flight before it only gets slower. Pure: no IO, no clock.

The gradient of Envoy's adaptive concurrency filter and of Netflix's concurrency-limits (Gradient2): the limit is
multiplied by the ratio of the latency that is usual to the latency now, and given head-room of its square root, so that
it grows while latency stands still. The usual latency is a slow mean, as in Gradient2, instead of a minimum that has to
be measured again and again at a concurrency of 3, as in Envoy: that would turn away requests for the sake of measuring,
and the few requests of a device would never make up for it.

Invariants, held by property tests: the limit stays within its bounds; it never falls while the latency is usual; it
never grows while less than half of it is used.
"""

import math
import statistics

WINDOW = 16
"""Answers to one step of the limit; their median is the latency now."""
USUAL_WINDOWS = 100
"""Windows over which the usual latency is an exponential mean, after the plain mean of the first `WARM_UP_WINDOWS`."""
WARM_UP_WINDOWS = 10
TOLERANCE = 1.5
"""How much slower than usual is still usual (Gradient2)."""
STEEPEST = 0.5
"""The least that one step leaves of the limit (Gradient2)."""
SMOOTHING = 0.2
"""Share of a step that is taken at once (Gradient2)."""
RECOVERY = 0.95
"""How fast the usual latency comes down after the latency has more than halved (Gradient2)."""
START = 128


class GradientLimit:
    """A limit between `least` and `most` that shrinks when answers get slower and grows while they don't."""

    def __init__(self, least: int, most: int, *, fixed: bool = False) -> None:
        self._least = min(least, most)
        self._most = most
        self._limit = float(most if fixed else max(self._least, min(START, most)))
        self._fixed = fixed
        self._usual_s = 0.0
        self._windows = 0
        self._taken: list[float] = []
        self._busiest = 0

    @property
    def limit(self) -> int:
        """Requests that may be in flight."""
        return int(self._limit)

    def answered(self, seconds: float, inflight: int) -> None:
        """Count an answer that took `seconds`, or did not come within, with `inflight` requests at its end."""
        if self._fixed:
            return
        self._taken.append(seconds)
        self._busiest = max(self._busiest, inflight)
        if len(self._taken) >= WINDOW:
            self._step(statistics.median(self._taken), self._busiest)
            self._taken.clear()
            self._busiest = 0

    def _step(self, now_s: float, busiest: int) -> None:
        now_s = max(now_s, 1e-6)
        self._windows += 1
        weight = 1 / self._windows if self._windows <= WARM_UP_WINDOWS else 2 / (USUAL_WINDOWS + 1)
        usual_s = self._usual_s + weight * (now_s - self._usual_s)
        if usual_s > 2 * now_s:
            usual_s *= RECOVERY
        self._usual_s = usual_s
        if 2 * busiest < self._limit:  # latency at low load says nothing about the load that can be borne
            return
        gradient = max(STEEPEST, min(1.0, TOLERANCE * usual_s / now_s))
        wanted = self._limit * gradient + math.sqrt(self._limit)
        stepped = self._limit + SMOOTHING * (wanted - self._limit)
        self._limit = min(float(self._most), max(float(self._least), stepped))
