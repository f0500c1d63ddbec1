"""The running audit, on simulated traffic whose true risk is known: no false alarms, no drift overlooked."""

import math

import msgspec
import numpy as np
import pytest
from scipy.stats import binom

from hedgerow.audit import Audit, Move, State

EPSILON, DELTA, CHANCE, THRESHOLD = 0.02, 0.05, 0.02, 0.6
MODEL = "digest of the guarantee"


def audit(state: State | None = None, **changed: float) -> Audit:
    settings = {"epsilon": EPSILON, "delta": DELTA, "chance": CHANCE, "alert_chance": CHANCE, **changed}
    return Audit(MODEL, THRESHOLD, **settings, state=state)


def live(
    audit: Audit, rng: np.random.Generator, requests: int, risk: float, *, failing: float = 0.0, stop: bool = True
) -> list[Move]:
    """Traffic with scores uniform on [0, 1], of which a share `risk` of all is lost, all alike above the threshold.

    Those that pass are wrong with the same probability wherever they score: the risk at a level is in proportion to
    what passes there. The moves that came of it; with `stop`, only up to the first.
    """
    moves = []
    wrong = risk / (1 - THRESHOLD)
    for score, dice, luck, fails in rng.random((requests, 4)):
        audit.count()
        chance = audit.chance if score >= audit.threshold else 1.0
        if score < THRESHOLD or dice >= chance:
            continue
        if fails < failing:
            audit.failed(chance)
            continue
        move = audit.audited(score, float(luck < wrong), chance)
        if move is not None:
            moves.append(move)
            if stop:
                break
    return moves


def test_without_drift_there_is_no_alarm_in_all_but_delta_of_the_lives() -> None:
    rng, lives = np.random.default_rng(11), 60
    alarms = sum(bool(live(audit(), rng, 20_000, EPSILON)) for _ in range(lives))
    assert alarms <= binom.ppf(1 - 1e-6, lives, DELTA), f"{alarms} of {lives}"


@pytest.mark.parametrize("failing", [0.0, 0.6], ids=["all audits answered", "most audits fail"])
def test_a_risk_that_grew_is_found_and_the_gate_tightened_to_where_it_is_kept(failing: float) -> None:
    rng, watch = np.random.default_rng(12), audit()
    assert not live(watch, rng, 20_000, EPSILON / 4)
    (move,) = live(watch, rng, 60_000, 6 * EPSILON, failing=failing)
    assert move.before == THRESHOLD < move.after == watch.threshold
    assert "the risk is above 2.00%" in move.reason
    share_left = (1 - watch.threshold) / (1 - THRESHOLD) if watch.threshold <= 1 else 0.0
    assert 6 * EPSILON * share_left <= EPSILON


def test_a_gate_that_was_tightened_loosens_on_evidence_and_never_below_what_was_certified() -> None:
    rng, watch = np.random.default_rng(13), audit()
    live(watch, rng, 60_000, 6 * EPSILON)
    assert watch.threshold > THRESHOLD
    moves = live(watch, rng, 200_000, 0.0, stop=False)
    assert watch.threshold == THRESHOLD or not moves
    watch.move()
    while watch.threshold > THRESHOLD:
        watch.count(1000)
        watch.move()
    assert watch.threshold == THRESHOLD
    watch.count(10_000_000)
    assert watch.move() is None
    assert watch.threshold == THRESHOLD


def test_what_was_seen_of_late_is_the_risk_without_bias_whatever_the_chances_were() -> None:
    rng, watch = np.random.default_rng(14), audit()
    wrong = EPSILON / (1 - THRESHOLD)
    for number in range(60_000):
        score, dice, luck = rng.random(3)
        watch.count()
        chance = 1.0 if number % 2 else 0.05  # as if half of the time drift were suspected
        if score >= THRESHOLD and dice < chance:
            watch.audited(score, float(luck < wrong), chance)
    seen = dict(watch.risk())
    assert seen[THRESHOLD] == pytest.approx(EPSILON, rel=0.25)
    half_way = watch.levels[3]
    assert seen[half_way] == pytest.approx(EPSILON * (1 - half_way) / (1 - THRESHOLD), rel=0.35)


def test_suspicion_makes_audits_more_frequent_before_it_is_proof() -> None:
    rng, watch = np.random.default_rng(15), audit(alert_chance=0.5)
    seen = set()
    for _ in range(5000):
        seen.add(watch.chance)
        if live(watch, rng, 20, 5 * EPSILON):
            break
    assert seen == {CHANCE, 0.5}


def test_a_restart_forgets_nothing() -> None:
    one = audit()
    live(one, np.random.default_rng(16), 30_000, EPSILON)
    kept = msgspec.json.decode(msgspec.json.encode(one.save()), type=State)
    other = audit(kept)
    moves = [live(each, np.random.default_rng(17), 30_000, 6 * EPSILON) for each in (one, other)]
    assert moves[0] == moves[1] != []
    assert other.threshold == one.threshold
    assert other.suspicion() == pytest.approx(one.suspicion())


def test_another_guarantee_begins_anew() -> None:
    before = audit()
    live(before, np.random.default_rng(18), 60_000, 6 * EPSILON)
    after = Audit("another", 0.7, epsilon=EPSILON, delta=DELTA, chance=CHANCE, alert_chance=CHANCE, state=before.save())
    assert after.threshold == 0.7
    assert after.state.requests == 0


def test_where_even_the_surest_are_wrong_nothing_passes() -> None:
    watch = audit()
    for _ in range(400):
        watch.count(10)
        watch.audited(1.0, 1.0, 1.0)
        if watch.threshold > 1:
            break
    assert watch.threshold == math.nextafter(1.0, 2.0)


def test_moves_are_remembered_and_bounded() -> None:
    watch = audit()
    watch.state.moves = [Move(0.0, 0.0, 0.0, "")] * 1000
    for _ in range(400):
        watch.count(10)
        if watch.audited(1.0, 1.0, 1.0):
            break
    assert len(watch.state.moves) == 100
