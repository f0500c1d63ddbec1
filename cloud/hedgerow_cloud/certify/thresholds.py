"""From scores and losses to a threshold with a promise. Pure.

With s the score of the small model's answer, L ∈ [0, 1] what it loses against the large one's, and λ the threshold:

- **marginal** risk, R(λ) = E[L · 1{s ≥ λ}], over all requests. It never grows with λ, so λ is walked down from the top
  until the bound says no for the first time: risk-controlling prediction sets (Bates et al. 2021). R(λ) ≤ ε holds at
  the threshold found and at every larger one.
- **selective** risk, E[L | s ≥ λ], over the requests that pass. It may go up and down with λ, so thresholds are fixed
  in advance, from the scores of a part of the samples that is used for nothing else, and tested one after the other,
  each on the rest that it lets pass, until one fails: fixed-sequence testing (Angelopoulos et al. 2021, "Learn then
  Test"), from several places with a part of δ each, so that one bad start does not end it. The promise holds at those
  tested, and is not said of any in between.

Conditions: the samples are independent draws from the traffic that the gate will meet; neither model, nor the score,
was fitted to them or chosen by them; each ε of a table holds at 1 - δ by itself, not all at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import InvalidInput
from hedgerow_cloud.certify.bounds import BOUNDS, check_level, samples_needed

NOTHING_PASSES: Final = math.nextafter(1.0, 2.0)
"""The threshold above every score: what is left when no other keeps the risk."""
LAID_OUT: Final = 0.1
"""Share of the samples whose scores say where selective thresholds are tried;"""
STEPS: Final = 48
"""how many are, at shares of the traffic that grow evenly from"""
SPARE: Final = 1.3
"""times the fewest samples that can show anything;"""
STARTS: Final = 4
"""and from how many of them a sequence begins."""

Scores = NDArray[np.floating[Any]]
"""Shape (n,), each in [0, 1]."""
Losses = NDArray[np.floating[Any]]
"""Shape (n,), each in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A threshold and what it was chosen on."""

    threshold: float
    epsilon: float
    delta: float
    bound: str
    samples: int
    passed: int
    """How many of the samples score at or above the threshold."""
    lost: float
    """What those lose together."""
    tested: tuple[float, ...] = ()
    """Of a selective risk: the thresholds that the promise holds at, the largest first."""

    @property
    def escalated(self) -> float:
        """Share of the samples below the threshold."""
        return 1 - self.passed / self.samples


def marginal(scores: Scores, losses: Losses, *, epsilon: float, delta: float, bound: str) -> Choice:
    """The smallest threshold whose marginal risk is at most `epsilon` with confidence 1 - `delta`.

    Raises `InvalidInput` for arrays that are not scores and losses, for `epsilon` or `delta` outside (0, 1), and if
    there are too few samples for any threshold, saying how many it takes.
    """
    _check(scores, losses)
    check_level(len(scores), epsilon, delta, bound)
    order = np.argsort(-scores, kind="stable")
    ranked, sums = scores[order], losses[order]
    good = BOUNDS[bound](sums, epsilon, delta)
    # The first no ends the walk, whatever comes behind it. Equal scores pass or fail together.
    ends = np.flatnonzero(np.append(ranked[:-1] != ranked[1:], True))
    first_no = np.flatnonzero(~good[ends])
    kept = ends[: first_no[0]] if first_no.size else ends
    last = int(kept[-1]) if kept.size else -1
    return Choice(
        threshold=float(ranked[last]) if kept.size else NOTHING_PASSES,
        epsilon=epsilon,
        delta=delta,
        bound=bound,
        samples=len(scores),
        passed=last + 1,
        lost=float(sums[: last + 1].sum()),
    )


def selective(scores: Scores, losses: Losses, *, epsilon: float, delta: float, bound: str) -> Choice:
    """The smallest threshold tested whose selective risk is at most `epsilon`; raises as `marginal` does.

    The samples have to be in random order: the first of them lay out the thresholds.
    """
    _check(scores, losses)
    part = delta / STARTS
    least = samples_needed(epsilon, part, bound)
    laid_out = math.ceil(LAID_OUT * len(scores))
    check_level(len(scores) - laid_out, epsilon, part, bound)
    grid, scores, losses = scores[:laid_out], scores[laid_out:], losses[laid_out:]
    shares = np.linspace(min(1.0, SPARE * least / len(scores)), 1.0, STEPS)
    thresholds = np.unique(np.quantile(grid, 1 - shares, method="lower"))[::-1].tolist()
    kept: set[float] = set()
    for start in range(0, len(thresholds), math.ceil(len(thresholds) / STARTS)):
        for threshold in thresholds[start:]:
            passed = losses[scores >= threshold]
            if len(passed) < least or not BOUNDS[bound](passed, epsilon, part)[-1]:
                break
            kept.add(threshold)
    lowest = min(kept, default=NOTHING_PASSES)
    passes = scores >= lowest
    return Choice(
        threshold=lowest,
        epsilon=epsilon,
        delta=delta,
        bound=bound,
        samples=len(scores),
        passed=int(passes.sum()),
        lost=float(losses[passes].sum()),
        tested=tuple(sorted(kept, reverse=True)),
    )


def areas(scores: Sequence[Scores], losses: Losses) -> list[float]:
    """The area under the curve of selective risk over coverage for each of `scores`: less ranks failures better.

    Equal scores share what they lose.
    """
    found = []
    for one in scores:
        order = np.argsort(-one, kind="stable")
        ranked, sums = one[order], np.cumsum(losses[order])
        ends = np.flatnonzero(np.append(ranked[:-1] != ranked[1:], True))
        counts = np.concatenate(([0], ends + 1))
        totals = np.interp(np.arange(1, len(one) + 1), counts, np.concatenate(([0.0], sums[ends])))
        found.append(float((totals / np.arange(1, len(one) + 1)).mean()))
    return found


def _check(scores: Scores, losses: Losses) -> None:
    if scores.ndim != 1 or scores.shape != losses.shape:
        raise InvalidInput(f"scores and losses must be of one shape (n,), not {scores.shape} and {losses.shape}")
    for name, values in (("scores", scores), ("losses", losses)):
        if not ((values >= 0) & (values <= 1)).all():
            raise InvalidInput(f"{name} must be numbers from 0 to 1")
