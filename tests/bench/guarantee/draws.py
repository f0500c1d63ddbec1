"""Many calibration sets from one pool: what each method's gate then does to the pool."""

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from bench.guarantee.pools import Pool
from bench.guarantee.rivals import METHODS, oracle
from scipy.stats import binom

from hedgerow.gate import Gate
from hedgerow_cloud.certify.bounds import samples_needed


def measure(pool: Pool, *, samples: int, draws: int, epsilon: float, delta: float, seed: int) -> dict[str, Any]:
    """Of each method: how often its realised risk was above `epsilon`, the risk, and the share sent to the cloud."""
    rng = np.random.default_rng([seed, samples, round(epsilon * 1e6)])
    wrong = pool.wrong
    scores: dict[tuple[str, float], Any] = {}

    def outcome(gate: Gate) -> tuple[float, float]:
        key = gate.score, gate.temperature
        if key not in scores:
            scores[key] = gate.scores(pool.edge)
            if len(scores) > 64:  # temperatures differ from draw to draw
                scores.pop(next(iter(scores)))
        passed = scores[key] >= gate.threshold if key in scores else gate.scores(pool.edge) >= gate.threshold
        return float((passed * wrong).mean()), float(1 - passed.mean())

    best_risk, best_share = outcome(oracle(pool.edge, wrong, epsilon))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for _ in range(draws):
        drawn = rng.integers(0, len(pool), samples)
        for name, (_, method) in METHODS.items():
            found[name].append(outcome(method(pool.edge[drawn], wrong[drawn], epsilon, delta)))
    return {
        "samples": samples,
        "draws": draws,
        "epsilon": epsilon,
        "delta": delta,
        "needed": samples_needed(epsilon, delta),
        "oracle": {"risk": best_risk, "share": best_share},
        "methods": {name: _summary(runs, epsilon, best_share) for name, runs in found.items()},
        "allowed": int(binom.ppf(0.999, draws, delta)),
    }


def _summary(runs: list[tuple[float, float]], epsilon: float, best_share: float) -> Mapping[str, float]:
    risks, shares = zip(*runs, strict=True)
    return {
        "broken": sum(risk > epsilon for risk in risks),
        "risk_median": statistics.median(risks),
        "risk_max": max(risks),
        "share_median": statistics.median(shares),
        "over_oracle": statistics.median(shares) / best_share if best_share else float("inf"),
    }
