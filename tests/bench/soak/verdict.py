"""Whether a soak held: rules over its minutes. Pure.

- **Memory**: the slope of the least resident set of each minute over the last two thirds, by Theil and Sen, is at most
  `MAX_SLOPE_MB_H`. It does not hold if even the lower end of its 95 % interval (Sen 1968) is above that; between the
  two it is not shown.
- **Descriptors and threads**: the least of the last third is at most that of the first third, and `SPARE_COUNT` more.
  The least, because callers come and go.
- **Latency**: the median of the calm minutes' p99 in the last third is at most `MAX_P99_RATIO` times that of the first.
  Calm: the generator itself was on time (`CALM_MOOD_MS`, `CALM_LAG_MS`). With too few calm minutes it is not shown.
- **Failures**: none that should not be, be it in a minute that did not come to its end, or at the end.

The first minute warms up and counts for failures only.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Any

MAX_SLOPE_MB_H = 1.0
MAX_P99_RATIO = 1.5
SPARE_COUNT = 2
CALM_MOOD_MS = 2.0
"""What naps of the generator may take too long, p99, in a minute that tells of the server and not of the machine;"""
CALM_LAG_MS = 5.0
"""and how late it may have sent, p99."""
MIN_CALM = 3
"""Such minutes in a third."""
MIN_MINUTES = 12
"""Fewer show nothing of slopes and thirds."""
TIMED = ("sure", "unsure", "batch")
"""The kinds with enough requests a minute for a p99."""
Z_95 = 1.96

Minutes = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule: "held", "broken" or "not shown", and the figures."""

    rule: str
    outcome: str
    figures: str


@dataclass(frozen=True, slots=True)
class Slope:
    """A Theil-Sen slope and its 95 % interval, in units of y per unit of x."""

    middle: float
    low: float
    high: float


def theil_sen(xs: Sequence[float], ys: Sequence[float]) -> Slope:
    """The median of the slopes between all pairs, with Sen's interval from the variance of Kendall's S."""
    slopes = sorted((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(zip(xs, ys, strict=True), 2))
    n, pairs = len(xs), len(slopes)
    half = Z_95 * sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low, high = round((pairs - half) / 2), round((pairs + half) / 2)
    return Slope(statistics.median(slopes), slopes[max(low, 0)], slopes[min(high, pairs - 1)])


def findings(minutes: Minutes, failures_besides: int = 0) -> list[Finding]:
    """What each rule says. `failures_besides`: those that no minute counts."""
    counted = minutes[1:]
    enough = len(counted) >= MIN_MINUTES
    found = [_failures(minutes, failures_besides)]
    if not enough:
        return [*found, Finding("all others", "not shown", f"{len(counted)} minutes are too few")]
    third = len(counted) // 3
    first, last = counted[:third], counted[-third:]
    found.append(_memory(counted[third:]))
    found += [_flat(name, first, last) for name in ("descriptors", "threads")]
    found += [_latency(kind, first, last) for kind in TIMED]
    return found


def _failures(minutes: Minutes, besides: int) -> Finding:
    failures, unsent = (sum(minute[name] for minute in minutes) for name in ("failures", "unsent"))
    failures += besides
    outcome = "broken" if failures else "not shown" if unsent or not minutes else "held"
    return Finding("nothing fails that should not", outcome, f"{failures} failures, {unsent} requests not sent")


def _memory(minutes: Minutes) -> Finding:
    slope = theil_sen([minute["at_s"] / 3600 for minute in minutes], [minute["agent"]["rss_mb"] for minute in minutes])
    outcome = "held" if slope.middle <= MAX_SLOPE_MB_H else "broken" if slope.low > MAX_SLOPE_MB_H else "not shown"
    figures = f"{slope.middle:.2f} MB an hour ({slope.low:.2f} to {slope.high:.2f})"
    return Finding(f"memory grows by {MAX_SLOPE_MB_H:g} MB an hour at most", outcome, figures)


def _flat(name: str, first: Minutes, last: Minutes) -> Finding:
    before, after = (min(minute["agent"][name] for minute in part) for part in (first, last))
    outcome = "held" if after <= before + SPARE_COUNT else "broken"
    return Finding(f"{name} do not grow", outcome, f"least {before:g} in the first third, {after:g} in the last")


def _latency(kind: str, first: Minutes, last: Minutes) -> Finding:
    rule = f"p99 of `{kind}` stays within {MAX_P99_RATIO:g} times"
    before, after = (_calm_p99s(kind, part) for part in (first, last))
    if min(len(before), len(after)) < MIN_CALM:
        return Finding(rule, "not shown", f"{len(before)} calm minutes in the first third, {len(after)} in the last")
    p99_before, p99_after = statistics.median(before), statistics.median(after)
    ratio = p99_after / p99_before
    figures = f"{p99_before:.2f} ms in {len(before)} calm minutes, then {p99_after:.2f} ms in {len(after)}: {ratio:.2f}"
    return Finding(rule, "held" if ratio <= MAX_P99_RATIO else "broken", figures)


def _calm_p99s(kind: str, minutes: Minutes) -> list[float]:
    return [
        minute["kinds"][kind]["p99_ms"]
        for minute in minutes
        if minute["mood_p99_ms"] <= CALM_MOOD_MS and minute["lag_p99_ms"] <= CALM_LAG_MS and kind in minute["kinds"]
    ]
