"""How long answers took lately: quantiles over a sliding window."""

import math
import time
from bisect import bisect_left, insort
from collections import deque

SAMPLES = 256
MAX_AGE_S = 60.0
TOLERANCE = 1e-9
"""For the rounding of shares: 20 answers are enough for 0.95."""


class LatencyWindow:
    """The last `samples` latencies that are younger than `max_age_s`, in seconds.

    They expire so that a policy which stopped asking a slow backend asks again once what it knew has grown old.
    """

    def __init__(self, samples: int = SAMPLES, max_age_s: float = MAX_AGE_S) -> None:
        self._samples = samples
        self._max_age_s = max_age_s
        self._recent: deque[tuple[float, float]] = deque()
        self._sorted: list[float] = []

    def add(self, seconds: float, now: float | None = None) -> None:
        """Count one answer that took `seconds`; `now` is on the monotonic clock."""
        now = time.monotonic() if now is None else now
        if len(self._recent) >= self._samples:
            self._forget_oldest()
        self._recent.append((now, seconds))
        insort(self._sorted, seconds)
        self._expire(now)

    def quantile(self, q: float, now: float | None = None) -> float | None:
        """The smallest latency that at least a share `q` < 1 of the window does not exceed.

        None with fewer than 1 / (1 - q) answers: one slow start among a few is no tail.
        """
        self._expire(time.monotonic() if now is None else now)
        count = len(self._sorted)
        if count * (1 - q) < 1 - TOLERANCE:
            return None
        return self._sorted[max(1, math.ceil(q * count - TOLERANCE)) - 1]

    def clear(self) -> None:
        """Forget everything."""
        self._recent.clear()
        self._sorted.clear()

    def _expire(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > self._max_age_s:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, seconds = self._recent.popleft()
        del self._sorted[bisect_left(self._sorted, seconds)]
