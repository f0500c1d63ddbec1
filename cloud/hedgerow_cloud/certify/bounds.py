"""Upper confidence bounds on the mean of losses in [0, 1]. Pure.

Each says of growing sums of losses, entry m of what the first m + 1 of n samples lose where all others lose nothing,
whether their mean is at most ε with confidence 1 - δ over the draw of the samples. All of them only ever turn from yes
to no as a loss grows: that is what risk-controlling prediction sets (Bates et al. 2021) ask of a bound.

- `binomial`, for losses of 0 and 1: exact (Clopper and Pearson 1934), so nothing valid is tighter;
- `betting`, for any: bets at fixed odds against the mean being above ε, one after the other over all samples; what a
  mixture of such bets has won is a likelihood ratio of at least 1/δ with probability δ at most (Waudby-Smith and Ramdas
  2024; fixed fractions in place of adaptive ones, for the sake of that monotony). Gains from small variance;
- `hoeffding_bentkus`, for any: the better one of two classical inequalities, by the mean alone.

Which one is taken must not depend on what it says: `for_losses` goes by the kind of the losses.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, betaincinv

from hedgerow.errors import InvalidInput

Losses = NDArray[np.floating[Any]]
"""Shape (n,), each in [0, 1], in the order in which the samples come to be let through."""
Bound = Callable[[Losses, float, float], NDArray[np.bool_]]
"""``(losses, epsilon, delta)``: whether the mean is at most epsilon, of the first, of the first two, … of all n."""

FRACTIONS: Final = 24
"""Bets that `betting` mixes: their sizes go down from all that can be bet, by `RATIO` each."""
RATIO: Final = 0.75
LEVELS: Final = np.unique(np.concatenate((np.geomspace(1e-5, 0.01, 200), np.linspace(0.01, 0.999, 500))))
"""The values of ε that curves are drawn with."""


def binomial(losses: Losses, epsilon: float, delta: float) -> NDArray[np.bool_]:
    """See the module."""
    allowed = -1
    while upper_binomial(allowed + 1, len(losses), delta) <= epsilon:
        allowed += 1
    return np.asarray(np.cumsum(losses) <= allowed + 0.5)


def hoeffding_bentkus(losses: Losses, epsilon: float, delta: float) -> NDArray[np.bool_]:
    """See the module (Bates et al. 2021, section 3.1; Bentkus 2004)."""
    n = len(losses)
    mean = np.minimum(np.cumsum(losses) / n, epsilon)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(mean > 0, mean * np.log(mean / epsilon), 0.0) + (1 - mean) * np.log(
            (1 - mean) / (1 - epsilon)
        )
    hoeffding = np.exp(-n * divergence)
    bentkus = math.e * bdtr(np.ceil(n * mean - 1e-9), n, epsilon)
    return np.asarray(np.minimum(hoeffding, bentkus) <= delta)


def betting(losses: Losses, epsilon: float, delta: float) -> NDArray[np.bool_]:
    """See the module."""
    n = len(losses)
    # More than 1/(1 - ε) could lose all there is and more; nothing is left to lose after a whole loss at that.
    fractions = RATIO ** np.arange(FRACTIONS)[:, None] / (1 - epsilon) * (1 - 1e-12)
    lossless = np.log1p(fractions * epsilon)
    steps = np.log1p(fractions * (epsilon - losses)) - lossless
    won = n * lossless + np.cumsum(steps, axis=1)
    largest = won.max(axis=0)
    capital = largest + np.log(np.exp(won - largest).mean(axis=0))
    return np.asarray(capital >= -math.log(delta))


BOUNDS: Mapping[str, Bound] = {bound.__name__: bound for bound in (binomial, betting, hoeffding_bentkus)}


def for_losses(losses: Losses) -> str:
    """The bound to take for losses of this kind."""
    return "binomial" if bool(np.isin(losses, (0.0, 1.0)).all()) else "betting"


def upper_binomial(errors: int, samples: int, delta: float) -> float:
    """The exact upper confidence bound, at level 1 - `delta`, on the rate behind `errors` of `samples`."""
    return 1.0 if errors >= samples else float(betaincinv(errors + 1, samples - errors, 1 - delta))


def lower_binomial(errors: int, samples: int, delta: float) -> float:
    """The exact lower confidence bound, at level 1 - `delta`; above ε it says that a promise of ε was broken."""
    return 0.0 if errors <= 0 else float(betaincinv(errors, samples - errors + 1, delta))


def upper(bound: Bound, losses: Losses, delta: float) -> NDArray[np.float64]:
    """The upper confidence bounds themselves, of the first, the first two, …: the least of `LEVELS` that is granted.

    Shape (n,); 1 where none is. For curves; what is promised is asked of the bound itself.
    """
    granted = np.array([bound(losses, float(level), delta) for level in LEVELS])
    return np.where(granted.any(axis=0), LEVELS[granted.argmax(axis=0)], 1.0)


def samples_needed(epsilon: float, delta: float, bound: str = "binomial") -> int:
    """The smallest calibration set with which `bound` grants anything, one without a single loss."""
    least = math.ceil(math.log(delta) / math.log1p(-epsilon))
    if bound == "binomial":
        return least
    low, high = 1, least
    while not _grants(high, epsilon, delta, bound):
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _grants(middle, epsilon, delta, bound) else (middle + 1, high)
    return high


def _grants(samples: int, epsilon: float, delta: float, bound: str) -> bool:
    return bool(BOUNDS[bound](np.zeros(samples), epsilon, delta)[0])


def check_level(samples: int, epsilon: float, delta: float, bound: str = "binomial") -> None:
    """Raise `InvalidInput` unless a calibration set of that size can certify `epsilon` at `delta`."""
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise InvalidInput(f"{name} must be between 0 and 1, not {value}")
    if samples < (needed := samples_needed(epsilon, delta, bound)):
        raise InvalidInput(
            f"{samples} calibration samples cannot certify ε = {epsilon:g} at δ = {delta:g}: it takes at least {needed}"
        )
