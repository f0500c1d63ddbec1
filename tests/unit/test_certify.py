"""What the guarantee promises, against worlds whose true risk is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from hedgerow.errors import InvalidInput
from hedgerow.gate import Gate
from hedgerow_cloud.learn import certify
from hedgerow_cloud.learn.certify import NOTHING_PASSES, Provenance, choose, lower_bound, samples_needed, upper_bound

PROVENANCE = Provenance(
    calibration_sha256="c" * 64,
    student_sha256="s" * 64,
    teacher_sha256="t" * 64,
    engine="onnxruntime",
    precision="int8",
)


def world(rng: np.random.Generator, n: int, power: float, levels: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores uniform on [0, 1] (or on `levels` equal steps of it), wrong with probability (1 - score) ** power."""
    scores = rng.random(n)
    if levels:
        scores = np.floor(scores * levels) / levels
    return scores, rng.random(n) < (1 - scores) ** power


def true_risk(threshold: float, power: float, levels: int) -> float:
    """P(score ≥ threshold and wrong) in that world, exactly."""
    if threshold > 1:
        return 0.0
    if levels:
        steps = np.arange(math.ceil(round(threshold * levels, 9)), levels) / levels
        return float(((1 - steps) ** power).sum() / levels)
    return float((1 - threshold) ** (power + 1) / (power + 1))


@pytest.mark.parametrize("levels", [0, 12], ids=["continuous", "tied"])
@pytest.mark.parametrize(("power", "n"), [(1.0, 200), (4.0, 450), (0.3, 1000)])
def test_the_true_risk_keeps_the_promise_in_all_but_delta_of_the_draws(power: float, n: int, levels: int) -> None:
    epsilon, delta, draws = 0.05, 0.1, 2000
    rng = np.random.default_rng([n, levels])
    broken = 0
    for _ in range(draws):
        choice = choose(*world(rng, n, power, levels), epsilon=epsilon, delta=delta)
        broken += true_risk(choice.threshold, power, levels) > epsilon
    # If the promise holds, the number of broken ones is at most binomial(draws, delta).
    assert broken <= binom.ppf(1 - 1e-6, draws, delta), f"{broken} of {draws} draws"
    if not levels:
        # And it is no empty promise: a gate that sends everything to the cloud would never break it.
        assert broken > 0


def test_a_threshold_taken_from_the_error_rate_alone_would_break_the_promise() -> None:
    """The simulation can tell: without the confidence bound, about half of the draws are above ε."""
    epsilon, draws, broken = 0.05, 300, 0
    rng = np.random.default_rng(7)
    for _ in range(draws):
        scores, wrong = world(rng, 200, 1.0, 0)
        order = np.argsort(-scores)
        naive = scores[order][np.cumsum(wrong[order]) <= epsilon * len(scores)][-1]
        broken += true_risk(float(naive), 1.0, 0) > epsilon
    assert broken > 0.3 * draws


calibration_sets = st.integers(150, 400).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 20).map(lambda step: step / 20), min_size=n, max_size=n),
        st.sets(st.integers(0, n - 1), max_size=40),
    )
)


@settings(max_examples=60)
@given(calibration_sets)
def test_a_looser_promise_never_sends_more_to_the_cloud(data: tuple[list[float], set[int]]) -> None:
    scores = np.array(data[0])
    disagree = np.zeros(len(scores), bool)
    disagree[list(data[1])] = True
    choices = [choose(scores, disagree, epsilon=epsilon, delta=0.05) for epsilon in (0.02, 0.05, 0.1, 0.3)]
    thresholds = [choice.threshold for choice in choices]
    assert thresholds == sorted(thresholds, reverse=True)
    for choice in choices:
        passed = scores >= choice.threshold
        assert choice.passed == passed.sum()
        assert choice.errors == (passed & disagree).sum()
        # The bound is kept here and at every larger threshold, and broken at the next smaller one.
        for threshold in {*scores[passed], choice.threshold}:
            errors = int((disagree & (scores >= threshold)).sum())
            assert upper_bound(errors, len(scores), 0.05) <= choice.epsilon
        if (~passed).any():
            errors = int((disagree & (scores >= scores[~passed].max())).sum())
            assert upper_bound(errors, len(scores), 0.05) > choice.epsilon


@given(st.integers(1, 500), st.data(), st.floats(0.001, 0.5))
def test_bounds_are_those_of_the_binomial_distribution(n: int, data: st.DataObject, delta: float) -> None:
    k = data.draw(st.integers(0, n))
    low, high = lower_bound(k, n, delta), upper_bound(k, n, delta)
    assert low <= k / n <= high
    # By definition: at the bound, what was seen (or further out) has probability delta.
    if k < n:
        assert binom.cdf(k, n, high) == pytest.approx(delta, rel=1e-6)
        assert upper_bound(k + 1, n, delta) > high
    if k > 0:
        assert binom.sf(k - 1, n, low) == pytest.approx(delta, rel=1e-6)
        assert lower_bound(k - 1, n, delta) < low


def test_the_bound_agrees_with_published_values() -> None:
    # Clopper and Pearson's 95 % limits for 10 of 100 (two-sided, so 2.5 % a side): 4.9 % and 17.6 %.
    assert lower_bound(10, 100, 0.025) == pytest.approx(0.0490, abs=5e-5)
    assert upper_bound(10, 100, 0.025) == pytest.approx(0.1762, abs=5e-5)
    # Without an error it has a closed form.
    assert upper_bound(0, 1000, 0.05) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-9)


@pytest.mark.parametrize(("epsilon", "delta", "needed"), [(0.02, 0.05, 149), (0.01, 0.05, 299), (0.001, 0.01, 4603)])
def test_too_few_samples_are_refused_saying_how_many_it_takes(epsilon: float, delta: float, needed: int) -> None:
    assert samples_needed(epsilon, delta) == needed
    sure = np.ones(needed), np.zeros(needed, bool)
    assert choose(*sure, epsilon=epsilon, delta=delta).threshold == 1.0
    with pytest.raises(InvalidInput, match=rf"{needed - 1} calibration samples .* at least {needed}"):
        choose(sure[0][1:], sure[1][1:], epsilon=epsilon, delta=delta)


def test_wrong_where_it_is_surest_means_that_nothing_passes() -> None:
    scores = np.linspace(0, 1, 300)
    choice = choose(scores, scores > 0.9, epsilon=0.02, delta=0.05)
    assert choice.passed == 1  # 299 is one sample more than a single error allows
    everything_ties = choose(np.ones(300), scores > 0.9, epsilon=0.02, delta=0.05)
    assert everything_ties.threshold == NOTHING_PASSES
    assert everything_ties.escalated == 1.0
    assert not Gate(threshold=everything_ties.threshold).passes(1.0)


@pytest.mark.parametrize(
    ("scores", "disagree", "words"),
    [
        (np.ones(3), np.zeros(4, bool), r"\(3,\) and \(4,\)"),
        (np.ones((3, 1)), np.zeros((3, 1), bool), "one shape"),
        (np.ones(3), np.zeros(3), "booleans, not float64"),
        (np.full(3, np.nan), np.zeros(3, bool), "from 0 to 1"),
        (np.full(3, 1.1), np.zeros(3, bool), "from 0 to 1"),
    ],
)
def test_arrays_that_make_no_sense_are_refused(
    scores: NDArray[np.float64], disagree: NDArray[np.bool_], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        choose(scores, disagree, epsilon=0.5, delta=0.5)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.05), (1.0, 0.05), (0.02, 0.0), (0.02, 1.0), (math.nan, 0.05)])
def test_levels_outside_zero_and_one_are_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        choose(np.ones(500), np.zeros(500, bool), epsilon=epsilon, delta=delta)


def logits(rng: np.random.Generator, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    teacher = rng.normal(size=(n, 10)).astype(np.float32) * 4
    return teacher + rng.normal(size=(n, 10)).astype(np.float32), teacher


def test_the_guarantee_says_what_the_device_will_do() -> None:
    student, teacher = logits(np.random.default_rng(0), 800)
    guarantee = certify.certify(student, teacher, PROVENANCE, epsilon=0.02, delta=0.05)
    passed = guarantee.gate.scores(student) >= guarantee.gate.threshold
    disagree = student.argmax(1) != teacher.argmax(1)
    assert 0 < passed.sum() < 800
    assert guarantee.escalated == pytest.approx(1 - passed.mean())
    assert guarantee.errors == (passed & disagree).sum()
    assert upper_bound(guarantee.errors, 800, 0.05) <= 0.02
    assert guarantee.thresholds["0.02"] == guarantee.gate.threshold
    assert [float(level) for level in guarantee.thresholds] == [0.005, 0.01, 0.02, 0.03, 0.05, 0.1]
    assert list(guarantee.thresholds.values()) == sorted(guarantee.thresholds.values(), reverse=True)
    assert (guarantee.samples, guarantee.student_sha256, guarantee.teacher_sha256) == (800, "s" * 64, "t" * 64)
    margin = certify.certify(
        student, teacher, PROVENANCE, epsilon=0.02, delta=0.05, gate=Gate(score="margin", threshold=0, temperature=2.0)
    )
    assert (margin.gate.score, margin.gate.temperature) == ("margin", 2.0)


def test_levels_that_the_calibration_set_is_too_small_for_are_left_out_of_the_table() -> None:
    student, teacher = logits(np.random.default_rng(1), 200)
    guarantee = certify.certify(student, teacher, PROVENANCE, epsilon=0.05, delta=0.05)
    assert list(guarantee.thresholds) == ["0.02", "0.03", "0.05", "0.1"]


def test_an_answer_that_is_not_finite_never_counts_as_agreement() -> None:
    student, teacher = logits(np.random.default_rng(2), 300)
    student[:] = teacher
    student[:40, 3] = np.nan
    guarantee = certify.certify(student, teacher, PROVENANCE, epsilon=0.02, delta=0.05)
    assert guarantee.gate.threshold > 0
    assert guarantee.escalated == pytest.approx(40 / 300)
    with pytest.raises(InvalidInput, match="teacher's logits are not all finite"):
        certify.certify(teacher, student, PROVENANCE, epsilon=0.02, delta=0.05)
