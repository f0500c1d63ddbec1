"""What a threshold promises, against worlds whose true risk is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from hedgerow.errors import InvalidInput
from hedgerow.gate import Gate
from hedgerow_cloud.certify.bounds import upper_binomial
from hedgerow_cloud.certify.thresholds import NOTHING_PASSES, areas, marginal, selective

Floats = NDArray[np.float64]


def world(rng: np.random.Generator, n: int, power: float, levels: int) -> tuple[Floats, Floats]:
    """Scores uniform on [0, 1] (or on `levels` equal steps of it), wrong with probability (1 - score) ** power."""
    scores = rng.random(n)
    if levels:
        scores = np.floor(scores * levels) / levels
    return scores, (rng.random(n) < (1 - scores) ** power).astype(np.float64)


def true_risk(threshold: float, power: float, levels: int) -> float:
    """P(score ≥ threshold and wrong) in that world, exactly."""
    if threshold > 1:
        return 0.0
    if levels:
        steps = np.arange(math.ceil(round(threshold * levels, 9)), levels) / levels
        return float(((1 - steps) ** power).sum() / levels)
    return float((1 - threshold) ** (power + 1) / (power + 1))


def true_selective_risk(threshold: float, power: float) -> float:
    """P(wrong | score ≥ threshold) where scores are continuous."""
    return 0.0 if threshold >= 1 else true_risk(threshold, power, 0) / (1 - threshold)


@pytest.mark.parametrize("levels", [0, 12], ids=["continuous", "tied"])
@pytest.mark.parametrize(("power", "n"), [(1.0, 200), (4.0, 450), (0.3, 1000)])
def test_the_true_risk_keeps_the_promise_in_all_but_delta_of_the_draws(power: float, n: int, levels: int) -> None:
    epsilon, delta, draws = 0.05, 0.1, 2000
    rng = np.random.default_rng([n, levels])
    broken = 0
    for _ in range(draws):
        choice = marginal(*world(rng, n, power, levels), epsilon=epsilon, delta=delta, bound="binomial")
        broken += true_risk(choice.threshold, power, levels) > epsilon
    # If the promise holds, the number of broken ones is at most binomial(draws, delta).
    assert broken <= binom.ppf(1 - 1e-6, draws, delta), f"{broken} of {draws} draws"
    if not levels:
        # And it is no empty promise: a gate that sends everything to the cloud would never break it.
        assert broken > 0


@pytest.mark.parametrize("bound", ["betting", "hoeffding_bentkus"])
def test_losses_that_are_not_yes_or_no_keep_their_promise(bound: str) -> None:
    epsilon, delta, draws, n = 0.05, 0.1, 500, 300
    rng = np.random.default_rng(5)
    broken = kept = 0
    for _ in range(draws):
        scores, wrong = world(rng, n, 1.0, 0)
        losses = wrong * rng.random(n)  # half of what they were, on average
        choice = marginal(scores, losses, epsilon=epsilon, delta=delta, bound=bound)
        broken += true_risk(choice.threshold, 1.0, 0) / 2 > epsilon
        kept += choice.passed
    assert broken <= binom.ppf(1 - 1e-6, draws, delta), f"{broken} of {draws} draws"
    assert kept > 0


@pytest.mark.parametrize(("power", "n"), [(4.0, 1500), (9.0, 1500)])
def test_the_true_selective_risk_keeps_the_promise_in_all_but_delta_of_the_draws(power: float, n: int) -> None:
    epsilon, delta, draws = 0.05, 0.2, 1000
    rng = np.random.default_rng([n, int(power)])
    broken = passed = 0
    for _ in range(draws):
        choice = selective(*world(rng, n, power, 0), epsilon=epsilon, delta=delta, bound="binomial")
        broken += any(true_selective_risk(one, power) > epsilon for one in choice.tested)
        passed += choice.passed
    assert broken <= binom.ppf(1 - 1e-6, draws, delta), f"{broken} of {draws} draws"
    assert passed > 0.1 * draws * n, "something is let through"


def test_a_selective_promise_is_said_of_no_threshold_that_was_not_tested() -> None:
    choice = selective(*world(np.random.default_rng(1), 2000, 6.0, 0), epsilon=0.05, delta=0.2, bound="binomial")
    assert choice.threshold == choice.tested[-1] == min(choice.tested)
    assert list(choice.tested) == sorted(choice.tested, reverse=True)


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
    losses = np.zeros(len(scores))
    losses[list(data[1])] = 1.0
    choices = [marginal(scores, losses, epsilon=one, delta=0.05, bound="binomial") for one in (0.02, 0.05, 0.1, 0.3)]
    thresholds = [choice.threshold for choice in choices]
    assert thresholds == sorted(thresholds, reverse=True)
    for choice in choices:
        passed = scores >= choice.threshold
        assert choice.passed == passed.sum()
        assert choice.lost == losses[passed].sum()
        # The bound is kept here and at every larger threshold, and broken at the next smaller one.
        for threshold in {*scores[passed], choice.threshold}:
            errors = int(losses[scores >= threshold].sum())
            assert upper_binomial(errors, len(scores), 0.05) <= choice.epsilon
        if (~passed).any():
            errors = int(losses[scores >= scores[~passed].max()].sum())
            assert upper_binomial(errors, len(scores), 0.05) > choice.epsilon


def test_too_few_samples_are_refused_saying_how_many_it_takes() -> None:
    sure = np.ones(149), np.zeros(149)
    assert marginal(*sure, epsilon=0.02, delta=0.05, bound="binomial").threshold == 1.0
    with pytest.raises(InvalidInput, match=r"148 calibration samples .* at least 149"):
        marginal(sure[0][1:], sure[1][1:], epsilon=0.02, delta=0.05, bound="binomial")


def test_wrong_where_it_is_surest_means_that_nothing_passes() -> None:
    scores = np.linspace(0, 1, 300)
    wrong = (scores > 0.9).astype(np.float64)
    choice = marginal(scores, wrong, epsilon=0.02, delta=0.05, bound="binomial")
    assert choice.passed == 1  # 299 is one sample more than a single error allows
    everything_ties = marginal(np.ones(300), wrong, epsilon=0.02, delta=0.05, bound="binomial")
    assert everything_ties.threshold == NOTHING_PASSES
    assert everything_ties.escalated == 1.0
    assert not Gate(threshold=everything_ties.threshold).passes(1.0)
    assert selective(np.ones(600), np.ones(600), epsilon=0.05, delta=0.2, bound="binomial").tested == ()


@pytest.mark.parametrize(
    ("scores", "losses", "words"),
    [
        (np.ones(3), np.zeros(4), r"\(3,\) and \(4,\)"),
        (np.ones((3, 1)), np.zeros((3, 1)), "one shape"),
        (np.ones(3), np.full(3, 1.5), "losses must be numbers from 0 to 1"),
        (np.full(3, np.nan), np.zeros(3), "scores must be numbers from 0 to 1"),
        (np.full(3, 1.1), np.zeros(3), "scores must be numbers from 0 to 1"),
    ],
)
def test_arrays_that_make_no_sense_are_refused(scores: Floats, losses: Floats, words: str) -> None:
    for choose in (marginal, selective):
        with pytest.raises(InvalidInput, match=words):
            choose(scores, losses, epsilon=0.5, delta=0.5, bound="binomial")


def test_a_score_that_ranks_failures_lower_has_the_smaller_area() -> None:
    rng = np.random.default_rng(2)
    losses = (rng.random(2000) < 0.2).astype(np.float64)
    good, poor = rng.random(2000) - losses * 0.5, rng.random(2000)
    ranked = areas([np.clip(good, 0, 1), poor, 1 - np.clip(good, 0, 1), np.ones(2000)], losses)
    assert ranked[0] < ranked[1] < ranked[2]
    assert ranked[3] == pytest.approx(losses.mean()), "what cannot tell is as good as chance"
