"""What the benchmark of the guarantee says of draws and of drift, on pools whose truth is known."""

import numpy as np
from bench.guarantee.draws import measure
from bench.guarantee.drift import World, live
from bench.guarantee.pools import Pool
from bench.guarantee.rivals import oracle
from scipy.stats import binom

from hedgerow.audit import Audit

EPSILON, DELTA, CHANCE, THRESHOLD = 0.02, 0.05, 0.02, 0.6


def world(risk: float) -> World:
    """Scores uniform on [0, 1]; what passes is wrong wherever it scores, a share `risk` of all requests."""
    rng = np.random.default_rng(1)
    scores = rng.random(50_000)
    return World(scores, ((scores >= THRESHOLD) & (rng.random(50_000) < risk / (1 - THRESHOLD))).astype(np.float64))


def audit() -> Audit:
    return Audit("g", THRESHOLD, epsilon=EPSILON, delta=DELTA, chance=CHANCE, alert_chance=CHANCE)


def test_a_stream_without_drift_moves_no_gate_and_loses_what_its_risk_says() -> None:
    calm = world(EPSILON / 2)
    lives = [live(audit(), calm, 20_000, np.random.default_rng(seed)) for seed in range(30)]
    assert sum(life.moved_after is not None for life in lives) <= binom.ppf(1 - 1e-6, len(lives), DELTA)
    lost = np.mean([life.lost / 20_000 for life in lives])
    assert abs(lost - calm.risk(THRESHOLD)) < 0.001
    audits = np.mean([life.audits / 20_000 for life in lives])
    assert abs(audits - CHANCE * (1 - THRESHOLD)) < 0.001


def test_drift_moves_the_gate_and_what_is_lost_afterwards_is_less() -> None:
    watch, rng = audit(), np.random.default_rng(2)
    assert live(watch, world(EPSILON / 4), 20_000, rng).moved_after is None
    drifted = world(6 * EPSILON)
    life = live(watch, drifted, 100_000, rng, stop=True)
    assert life.moved_after is not None
    assert life.threshold > THRESHOLD
    assert drifted.risk(life.threshold) < drifted.risk(THRESHOLD) / 2


def pool() -> Pool:
    """Two classes; the edge is wrong the more often the less sure it is."""
    rng = np.random.default_rng(3)
    sure = rng.uniform(0, 6, 40_000)
    edge = np.stack([sure, np.zeros_like(sure)], axis=1).astype(np.float32)
    wrong = rng.random(len(sure)) < 1 / (1 + np.exp(1.5 * sure))
    cloud = np.where(wrong[:, None], edge[:, ::-1], edge)
    return Pool(edge, cloud.astype(np.float32), "made up")


def test_the_promise_is_kept_near_the_oracles_price_and_a_fixed_threshold_keeps_none() -> None:
    made = pool()
    run = measure(made, samples=1500, draws=60, epsilon=EPSILON, delta=DELTA, seed=1)
    ours = run["methods"]["hedgerow"]
    assert ours["broken"] <= run["allowed"]
    assert 1 <= ours["over_oracle"] < 1.5
    assert run["methods"]["fixed-0.5"]["broken"] == run["draws"]


def test_the_oracle_keeps_the_risk_in_the_pool_and_could_not_let_one_more_pass() -> None:
    made = pool()
    gate = oracle(made.edge, made.wrong, EPSILON)
    scores = gate.scores(made.edge)
    assert ((scores >= gate.threshold) * made.wrong).mean() <= EPSILON
    next_one = scores[scores < gate.threshold].max()
    assert ((scores >= next_one) * made.wrong).mean() >= EPSILON - 1 / len(made)
