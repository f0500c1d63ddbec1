"""Ways to set a threshold: ours, and those that people use instead. Each gets the same calibration set."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from hedgerow.gate import Gate
from hedgerow_cloud.certify.bounds import for_losses
from hedgerow_cloud.certify.thresholds import NOTHING_PASSES, marginal

Logits = NDArray[np.float32]
Losses = NDArray[np.float64]
Method = Callable[[Logits, Losses, float, float], Gate]
"""``(edge, losses, epsilon, delta)``: the gate, from the calibration set."""

TARGET_SHARE = 0.2
"""Sent to the cloud by the rule that goes by that alone."""


def hedgerow(edge: Logits, losses: Losses, epsilon: float, delta: float) -> Gate:
    """Risk control by the exact bound, over the largest probability."""
    gate = Gate(threshold=NOTHING_PASSES)
    choice = marginal(gate.scores(edge), losses, epsilon=epsilon, delta=delta, bound=for_losses(losses))
    return Gate(threshold=choice.threshold)


def fixed(threshold: float, score: str = "max_probability") -> Method:
    """Always the same threshold."""
    return lambda *_: Gate(score=score, threshold=threshold)


def calibrated(edge: Logits, losses: Losses, _: float, __: float) -> Gate:
    """0.9 after temperature scaling (Guo et al. 2017), fitted to say how likely the edge is to be right."""

    def surprise(log_temperature: float) -> float:
        sure = Gate(threshold=0.0, temperature=float(np.exp(log_temperature))).scores(edge)
        right = np.clip(np.where(losses > 0, 1 - sure, sure), 1e-12, 1)
        return float(-np.log(right).mean())

    found = minimize_scalar(surprise, bounds=(-3, 3), method="bounded")
    return Gate(threshold=0.9, temperature=float(np.exp(found.x)))


def target_share(edge: Logits, _: Losses, __: float, ___: float) -> Gate:
    """The quantile of the scores that sends `TARGET_SHARE` to the cloud."""
    scores = Gate(threshold=0.0).scores(edge)
    return Gate(threshold=float(np.quantile(scores, TARGET_SHARE)))


METHODS: Mapping[str, tuple[str, Method]] = {
    "hedgerow": ("Hedgerow", hedgerow),
    "fixed-0.5": ("fixed at 0.5", fixed(0.5)),
    "fixed-0.9": ("fixed at 0.9", fixed(0.9)),
    "calibrated-0.9": ("temperature-scaled, 0.9", calibrated),
    "sedna": ("Sedna's CrossEntropy, 0.5", fixed(0.5, "entropy")),
    "share": (f"a cloud share of {TARGET_SHARE:.0%}", target_share),
}


def oracle(edge: Logits, losses: Losses, epsilon: float) -> Gate:
    """The smallest threshold whose risk is at most `epsilon` in the pool itself: what no calibration set can know."""
    scores = Gate(threshold=0.0).scores(edge)
    order = np.argsort(-scores, kind="stable")
    ranked, risk = scores[order], np.cumsum(losses[order]) / len(losses)
    ends = np.flatnonzero(np.append(ranked[:-1] != ranked[1:], True))
    kept = ends[risk[ends] <= epsilon]
    return Gate(threshold=float(ranked[kept[-1]]) if kept.size else NOTHING_PASSES)
