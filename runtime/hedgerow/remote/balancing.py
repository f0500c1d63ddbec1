"""Which endpoint is asked next, and which is left alone for a while. Pure: no IO, no clock.

Invariants, held by property tests:

- an open endpoint is never chosen; an ejected one only where all others are open or ejected;
- one that was avoided is chosen only where there is no other;
- the zone's own endpoints get everything while most of them are well, and less the fewer are;
- at most `MAX_EJECTED` of the endpoints, but at least one, are ejected, and never the last that answers.
"""

import random
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

OVERPROVISIONING = 1.4
"""A zone gets everything while this times its healthy share is one or more (Envoy's priority load default)."""
FAULTS_TO_EJECT = 5
EJECTED_S = 30.0
"""Times the number of ejections so far."""
MAX_EJECTED_S = 300.0
MAX_EJECTED = 0.1
GOOD_CONDUCT_S = 10.0
"""A former ejection is forgotten for each such time without another."""


class Candidate(Protocol):
    """What the choice sees of an endpoint."""

    @property
    def zone(self) -> str:
        """Where it stands."""
        ...

    @property
    def open(self) -> bool:
        """Whether its circuit is open."""
        ...

    def ejected(self, now: float) -> bool:
        """Whether it is left alone for its faults."""
        ...

    def cost(self, now: float) -> float:
        """What another request there is expected to take, all that is in flight before it included."""
        ...


C = TypeVar("C", bound=Candidate)


def choose(
    candidates: Sequence[C], *, zone: str, now: float, draw: random.Random, avoid: Container[C] = ()
) -> C | None:
    """The cheaper of two that are drawn from those that are fit (the power of two choices); None if all are open."""
    closed = [one for one in candidates if not one.open]
    fit = [one for one in closed if not one.ejected(now)] or closed
    pool = [one for one in fit if one not in avoid] or [one for one in closed if one not in avoid] or fit
    if zone:
        own = sum(one.zone == zone for one in candidates)
        well = sum(one.zone == zone for one in fit)
        near = [one for one in pool if one.zone == zone]
        if near and draw.random() * own < OVERPROVISIONING * well:
            pool = near
    if len(pool) < 2:
        return pool[0] if pool else None
    first = int(draw.random() * len(pool))
    second = (first + 1 + int(draw.random() * (len(pool) - 1))) % len(pool)
    one, other = pool[first], pool[second]
    return one if one.cost(now) <= other.cost(now) else other


@dataclass(slots=True)
class Conduct:
    """An endpoint's faults in a row and ejections, by the rules of Envoy's outlier detection. Times are monotonic."""

    faults: int = 0
    ejections: int = 0
    until: float = float("-inf")

    def answered(self) -> None:
        """Count an answer."""
        self.faults = 0

    def faulted(self) -> bool:
        """Count a fault of the server; whether there have been enough in a row to be ejected."""
        self.faults += 1
        return self.faults >= FAULTS_TO_EJECT

    def ejected(self, now: float) -> bool:
        """Whether it is left alone."""
        return now < self.until

    def eject(self, now: float) -> float:
        """Leave it alone for the seconds returned."""
        behaved = max(0.0, now - self.until)
        forgotten = self.ejections if behaved == float("inf") else min(self.ejections, int(behaved / GOOD_CONDUCT_S))
        self.ejections += 1 - forgotten
        self.faults = 0
        seconds = min(MAX_EJECTED_S, EJECTED_S * self.ejections)
        self.until = now + seconds
        return seconds


def may_eject(culprit: C, candidates: Sequence[C], now: float) -> bool:
    """Whether there are enough others that `culprit` can be left alone."""
    ejected = sum(one.ejected(now) for one in candidates)
    others = any(one is not culprit and not one.open and not one.ejected(now) for one in candidates)
    return others and ejected < max(1, int(MAX_EJECTED * len(candidates)))
