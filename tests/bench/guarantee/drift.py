"""The world changes in mid-stream: how long until the audit acts, and what is lost until then and after.

The stream is simulated from a pool's real scores and mistakes: requests are drawn from it, and from one moment on from
those of another pool (the same inputs, turned, blurred, noisy, or other classes more often). Only what is lost is worth
an event, so a hundred thousand requests take a moment.
"""

from dataclasses import dataclass

import numpy as np
from bench.guarantee.pools import Pool
from numpy.typing import NDArray

from hedgerow.audit import Audit
from hedgerow.gate import Gate

CHUNK = 250
"""Requests that are drawn at once; the gate may move between any two."""


@dataclass(frozen=True, slots=True)
class World:
    """Scores and mistakes that requests are drawn from, shape (n,) each."""

    scores: NDArray[np.float64]
    wrong: NDArray[np.float64]

    @staticmethod
    def of(pool: Pool, gate: Gate) -> "World":
        """What `gate` sees of `pool`."""
        return World(gate.scores(pool.edge), pool.wrong)

    def risk(self, threshold: float) -> float:
        """The real one."""
        return float(((self.scores >= threshold) * self.wrong).mean())


@dataclass(slots=True)
class Life:
    """What became of a stream: after how many requests the gate first moved, how many answers were lost, and audits."""

    moved_after: int | None = None
    lost: int = 0
    audits: int = 0
    threshold: float = 0.0


def live(audit: Audit, world: World, requests: int, rng: np.random.Generator, *, stop: bool = False) -> Life:
    """`requests` from `world`, audited by `audit`; with `stop`, only until the gate moves."""
    life = Life(threshold=audit.threshold)
    done = 0
    while done < requests:
        count = min(CHUNK, requests - done)
        drawn = rng.integers(0, len(world.scores), count)
        dice = rng.random(count)
        at = 0
        while at < count:
            chance = audit.chance
            scores, wrong = world.scores[drawn[at:]], world.wrong[drawn[at:]]
            passes = scores >= audit.threshold
            looked_at = np.where(passes, dice[at:] < chance, True)
            events = np.flatnonzero(looked_at & (wrong > 0) & (scores >= audit.levels[0]))
            last = int(events[0]) if events.size else len(scores) - 1
            audit.count(last + 1)
            life.lost += int((passes & (wrong > 0))[: last + 1].sum())
            life.audits += int((passes & looked_at)[: last + 1].sum())
            at += last + 1
            if events.size:
                move = audit.audited(float(scores[last]), 1.0, chance if passes[last] else 1.0)
                if move is not None and life.moved_after is None:
                    life.moved_after = done + at
                    if stop:
                        life.threshold = audit.threshold
                        return life
        done += count
    life.threshold = audit.threshold
    return life
