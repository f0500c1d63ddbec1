"""How long answers took lately: quantiles over a sliding window, and the one figure that weighs an endpoint."""

import math
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque

SAMPLES = 256
MAX_AGE_S = 60.0
BOUND_MAX_AGE_S = 20.0
"""What a timeout says is a guess, and keeps others from finding out better: it is forgotten sooner than an answer."""
BEYOND = 2.0
"""How much longer than the longest wait known an answer is taken to need that did not come."""
TOLERANCE = 1e-9
"""For the rounding of shares: 20 answers are enough for 0.95."""
PEAK_DECAY_S = 10.0
"""Time constant with which a `PeakLatency` forgets (Finagle's default)."""


class LatencyWindow:
    """The last `samples` latencies that are younger than `max_age_s`, in seconds.

    They expire so that a policy which stopped asking a slow backend asks again once what it knew has grown old.
    """

    def __init__(self, samples: int = SAMPLES, max_age_s: float = MAX_AGE_S) -> None:
        self._samples = samples
        self._max_age_s = max_age_s
        self._recent: deque[tuple[float, float]] = deque()
        self._bounds: deque[tuple[float, float]] = deque()
        self._sorted: list[float] = []

    def add(self, seconds: float, now: float | None = None) -> None:
        """Count one answer that took `seconds`; `now` is on the monotonic clock."""
        self._remember(self._recent, seconds, time.monotonic() if now is None else now)

    def add_bound(self, seconds: float, now: float | None = None) -> None:
        """Count one answer that had not come after `seconds`, when nobody waited any longer.

        It counts as the median of those known to have taken longer (the Kaplan-Meier estimator's redistribution to the
        right, in one value), or else as `BEYOND` times as long, so that callers with the same patience are not let
        in again. Never as `seconds`: that would make a slow backend look the faster, the less patient its callers are.
        """
        longer = self._sorted[bisect_right(self._sorted, seconds) :]
        guess = longer[len(longer) // 2] if longer else BEYOND * seconds
        self._remember(self._bounds, guess, time.monotonic() if now is None else now)

    def quantile(self, q: float, now: float | None = None) -> float | None:
        """The smallest latency that at least a share `q` < 1 of the window does not exceed.

        None with fewer than 1 / (1 - q) answers: one slow start among a few is no tail. But where half of a few did not
        come at all, that is more than a start: the median stands in.
        """
        self._expire(time.monotonic() if now is None else now)
        count = len(self._sorted)
        if count * (1 - q) < 1 - TOLERANCE:
            if count < 2 or 2 * len(self._bounds) < count:
                return None
            q = 0.5
        return self._sorted[max(1, math.ceil(q * count - TOLERANCE)) - 1]

    def clear(self) -> None:
        """Forget everything."""
        self._recent.clear()
        self._bounds.clear()
        self._sorted.clear()

    def _remember(self, kind: deque[tuple[float, float]], seconds: float, now: float) -> None:
        if len(self._sorted) >= self._samples:
            self._forget_oldest(self._recent or self._bounds)
        kind.append((now, seconds))
        insort(self._sorted, seconds)
        self._expire(now)

    def _expire(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > self._max_age_s:
            self._forget_oldest(self._recent)
        while self._bounds and now - self._bounds[0][0] > BOUND_MAX_AGE_S:
            self._forget_oldest(self._bounds)

    def _forget_oldest(self, kind: deque[tuple[float, float]]) -> None:
        _, seconds = kind.popleft()
        del self._sorted[bisect_left(self._sorted, seconds)]


class PeakLatency:
    """One figure for how slow an endpoint is now: jumps to a slow answer at once, comes down over `PEAK_DECAY_S`.

    Finagle's peak EWMA: an exponentially weighted mean that believes bad news first. It decays while nothing is asked,
    so that an endpoint which was slow once is tried again.
    """

    __slots__ = ("_at", "_seconds")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._at = -math.inf

    @property
    def known(self) -> bool:
        """Whether there was an answer."""
        return self._at > -math.inf

    def add(self, seconds: float, now: float) -> None:
        """Count one answer that took `seconds`, or did not come within."""
        weight = math.exp(-(now - self._at) / PEAK_DECAY_S)  # 0 before the first answer
        old = self._seconds * weight
        self._seconds = seconds if seconds >= old else old + seconds * (1 - weight)
        self._at = now

    def value(self, now: float) -> float:
        """Seconds; 0 before the first answer."""
        return self._seconds * math.exp(-(now - self._at) / PEAK_DECAY_S) if self.known else 0.0

    def clear(self) -> None:
        """Forget everything."""
        self._seconds, self._at = 0.0, -math.inf
