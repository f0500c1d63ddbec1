"""What each kind of traffic met, minute by minute."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

EXAMPLES = 5
"""Failures of a kind that should not be, kept word by word."""


@dataclass(slots=True)
class Kind:
    """Of one kind of traffic in one minute. Times in seconds."""

    latencies: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Minute:
    """What one minute met."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    lags: list[float] = field(default_factory=list)
    """How late requests were sent, in seconds."""
    tiers: Counter[str] = field(default_factory=Counter)
    """Who answered, as the answers say; "degraded" for those that are second best."""
    events: list[str] = field(default_factory=list)
    failures: int = 0
    unsent: int = 0


class Tally:
    """The minute that is being filled, and the first failures of each kind."""

    def __init__(self) -> None:
        self._minute = Minute()
        self.failures: list[str] = []
        self._examples: Counter[str] = Counter()

    def sent(self, lag_s: float) -> None:
        """A request went out this late."""
        self._minute.lags.append(lag_s)

    def unsent(self) -> None:
        """A request was due, and too many were out."""
        self._minute.unsent += 1

    def met(self, kind: str, outcome: str, latency_s: float | None = None) -> None:
        """`outcome` is as it should be; with a latency it was an answer."""
        found = self._minute.kinds.setdefault(kind, Kind())
        found.outcomes[outcome] += 1
        if latency_s is not None:
            found.latencies.append(latency_s)

    def answered_by(self, who: str) -> None:
        """An answer says who gave it."""
        self._minute.tiers[who] += 1

    def failed(self, kind: str, what: str) -> None:
        """Something that should not be."""
        self.met(kind, "unexpected")
        self._minute.failures += 1
        self._examples[kind] += 1
        if self._examples[kind] <= EXAMPLES:
            self.failures.append(f"{kind}: {what}")

    def event(self, what: str) -> None:
        """Something was done to the agent."""
        self._minute.events.append(what)

    def take(self) -> Minute:
        """The minute so far; a new one begins."""
        minute, self._minute = self._minute, Minute()
        return minute


def row(minute: Minute) -> dict[str, object]:
    """`minute` as it stands in the results."""
    return {
        "kinds": {
            name: {"outcomes": dict(kind.outcomes), **quantiles_ms("", kind.latencies)}
            for name, kind in sorted(minute.kinds.items())
        },
        "tiers": dict(minute.tiers),
        "events": minute.events,
        "failures": minute.failures,
        "unsent": minute.unsent,
        **quantiles_ms("lag_", minute.lags),
    }


def quantiles_ms(prefix: str, seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds; nothing of nothing."""
    if not seconds:
        return {}
    p50_s, p99_s = np.percentile(seconds, (50, 99))
    return {f"{prefix}p50_ms": round(p50_s * 1e3, 3), f"{prefix}p99_ms": round(p99_s * 1e3, 3)}
