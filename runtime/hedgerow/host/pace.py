"""How long runs of a model take, by the size of the batch, and whether they are short enough for the event loop. Pure.

Estimates are bounded as TCP bounds round trips (RFC 6298): a mean, and on top of it some mean deviations.
"""

from collections import deque

GAIN = 1 / 8
SPREAD_GAIN = 1 / 4
SPREADS = 2.0
"""Mean deviations above the mean that nearly all runs stay under."""
FIRST_SPREAD = 0.5
"""The mean deviation as a share of the mean, while only one run is known."""
MAX_LEAP = 4.0
"""Times the expected that one run counts at most: where the whole machine stood still, the model is no slower."""
MIN_VARIANCE = 1e-6
"""Of the rows of recent runs, below which they tell nothing of other sizes."""
PROOF_RUNS = 32
"""Runs that must have been short before one is made on the event loop."""
MAX_PROOF_RUNS = 1024
PROOF_SHARE = 0.95
"""Of the recent runs that must have been short."""
CLEARLY = 2.0
"""Times the limit of processor time that one run on the event loop may use before runs go back to the threads. On the
clock it may take longer, where another process has the processor, but"""
STALL_S = 0.05
"""no longer than this,"""
STRIKES = 4.0
"""nor so many times in a row; each is forgiven by `PROOF_RUNS` short ones."""


class RunTimes:
    """Seconds that a run takes, by its rows: a line through the recent runs (exponentially weighted least squares).

    A line and not a mean of each size, because what is refused is never measured: one slow batch of 32 would keep
    batches of 32 from ever being tried again. For the same reason rows cost nothing until the first two sizes tell.
    """

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0  # weighted means, then variance and covariance
        self._variance = self._covariance = 0.0
        self._slope = 0.0
        self._spread = FIRST_SPREAD

    def add(self, rows: int, seconds: float) -> None:
        """Count a run."""
        expected = self.expected(rows)
        if expected:
            seconds = min(seconds, MAX_LEAP * expected)
            self._spread += SPREAD_GAIN * (abs(seconds - expected) / expected - self._spread)
            off_rows, off_s = rows - self._rows, seconds - self._seconds
            self._rows += GAIN * off_rows
            self._seconds += GAIN * off_s
            self._variance = (1 - GAIN) * (self._variance + GAIN * off_rows**2)
            self._covariance = (1 - GAIN) * (self._covariance + GAIN * off_rows * off_s)
        else:
            self._rows, self._seconds = float(rows), seconds
        if self._variance > MIN_VARIANCE:  # more rows never take less time, and never more than by themselves
            by_itself = self._seconds / max(1.0, self._rows)
            self._slope = min(max(self._covariance / self._variance, 0.0), by_itself)

    def expected(self, rows: int) -> float:
        """The mean for a batch of `rows`; 0 while nothing is known."""
        return max(0.0, self._seconds + self._slope * (rows - self._rows))

    def bound(self, rows: int) -> float:
        """What nearly all batches of `rows` stay under; 0 while nothing is known."""
        return self.expected(rows) * (1 + SPREADS * self._spread)


class Inlining:
    """Whether runs may be made on the event loop, because they are shorter than `below_s`.

    A hop to a thread and back costs some 100 µs, and two threads that share the interpreter's lock call an engine of
    microseconds more slowly than one. What it takes is a proof: `PROOF_RUNS` runs of which nearly all used less
    processor time than the limit, the fastest also less time on the clock (processor time alone would call a model
    fast that waits for an accelerator; the clock alone would count the waiting for the interpreter's lock, which on
    the event loop there is none of). The first run that clearly uses more there ends it, or several that take longer:
    one may have been interrupted by another process. Each time a longer proof is asked for.
    """

    def __init__(self, below_s: float) -> None:
        self._below_s = below_s
        self._cpu = RunTimes()
        self._largest = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=PROOF_RUNS)
        self._runs = 0
        self._needed = PROOF_RUNS
        self._strikes = 0.0
        self.proved = False

    def add(self, rows: int, wall_s: float, cpu_s: float, *, inline: bool) -> None:
        """Count a run, on the event loop if `inline`."""
        if not self._below_s or not rows:  # a run of no rows proves nothing
            return
        if inline and self._disproved(wall_s, cpu_s):
            self.proved = False
            self._strikes = 0.0
            self._runs = 0
            self._needed = min(2 * self._needed, MAX_PROOF_RUNS)
            self._recent.clear()
            return
        self._cpu.add(rows, cpu_s)
        self._largest = max(self._largest, rows)
        self._recent.append((wall_s, cpu_s))
        self._runs += 1
        if not self.proved and self._runs >= self._needed and not self._runs % PROOF_RUNS:
            short = sum(cpu_s < self._below_s for _, cpu_s in self._recent)
            fastest_s = min(wall_s for wall_s, _ in self._recent)
            self.proved = short >= PROOF_SHARE * len(self._recent) and fastest_s < self._below_s

    def _disproved(self, wall_s: float, cpu_s: float) -> bool:
        limit_s = CLEARLY * self._below_s
        if wall_s > limit_s:
            self._strikes += 1.0
        else:
            self._strikes = max(0.0, self._strikes - 1 / PROOF_RUNS)
        return cpu_s > limit_s or wall_s > max(limit_s, STALL_S) or self._strikes >= STRIKES

    def allows(self, rows: int) -> bool:
        """Whether a batch of `rows` is expected to be short enough, more rows than ever ran counting in full."""
        return self.proved and self._cpu.expected(rows) * max(1.0, rows / self._largest) < self._below_s
