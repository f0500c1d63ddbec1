"""What calls came to: good, late, wrong, refused, held; and the figures of a phase. Pure."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from bench.overload.calls import GAVE_UP, HELD, RESET

OK = 0
NAMES: Mapping[int, str] = {
    **{status.value[0]: status.name for status in grpc.StatusCode},
    RESET: "reset",
    GAVE_UP: "gave up",
    HELD: "held",
}
REFUSALS = frozenset({"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"})
"""What a server may say that has too much to do. Said later than `IN_TIME`, it is no refusal but `LATE`."""
IN_TIME = 0.5
"""The share of the deadline within which a refusal must come to be one: so much is left to do something else in."""
LATE = "refused too late"
FIRST_S = 2.0
"""Of a phase: what is good in it tells how soon a server recovers."""


@dataclass(slots=True)
class Phase:
    """The calls of one phase. Times in seconds."""

    name: str
    offered: float
    """A second; 0: a closed loop."""
    started: float = 0.0
    """On the monotonic clock."""
    seconds: float = 0.0
    lags: list[float] = field(default_factory=list)
    ends: list[tuple[float, int, float, bytes | None]] = field(default_factory=list)
    """Of each call: when it was made after the phase began, its status, how long it took, its answer."""
    unsent: int = 0
    """Calls that were due and not made: the generator had too many open."""
    cpu_s: float = 0.0
    """Of the generator."""


def report(phase: Phase, deadline_s: float, right: Callable[[bytes], bool]) -> dict[str, Any]:
    """The figures. `right` tells whether an answer is."""
    counts: Counter[str] = Counter()
    took: dict[str, list[float]] = {"refused": [], "good": []}
    first_sent = first_good = 0
    for sent, status, took_s, answer in phase.ends:
        name = outcome(status, took_s, deadline_s, answer, right)
        counts[name] += 1
        took.setdefault("refused" if name in REFUSALS else name, []).append(took_s)
        if sent < FIRST_S:
            first_sent += 1
            first_good += name == "good"
    return {
        "phase": phase.name,
        "offered": phase.offered,
        "seconds": phase.seconds,
        "sent": (len(phase.ends) - counts[NAMES[HELD]]) / phase.seconds,
        "goodput": counts["good"] / phase.seconds,
        "first": {"sent": first_sent, "good": first_good},
        "outcomes": dict(counts.most_common()),
        "unsent": phase.unsent,
        "generator_cpu": phase.cpu_s / phase.seconds,
        **{
            f"{name}_ms": [round(float(quantile) * 1e3, 3) for quantile in np.percentile(times, (50, 99))]
            for name, times in {"lag": phase.lags, **took}.items()
            if times
        },
    }


def outcome(status: int, took_s: float, deadline_s: float, answer: bytes | None, right: Callable[[bytes], bool]) -> str:
    """A name for how one call ended."""
    if status != OK:
        name = NAMES.get(status, f"status {status}")
        return LATE if name in REFUSALS and took_s > IN_TIME * deadline_s else name
    if answer is None or not right(answer):
        return "wrong"
    return "good" if took_s <= deadline_s else "late"
