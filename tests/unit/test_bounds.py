"""Bounds on mean losses: valid where the truth is known, monotone, and no looser than they need be."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from hedgerow.errors import InvalidInput
from hedgerow_cloud.certify.bounds import (
    BOUNDS,
    check_level,
    for_losses,
    lower_binomial,
    samples_needed,
    upper,
    upper_binomial,
)

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
EPSILON, DELTA = 0.05, 0.1
WORLDS: dict[str, Draw] = {
    "yes or no": lambda rng, n: (rng.random(n) < EPSILON).astype(np.float64),
    "all alike": lambda rng, n: np.clip(rng.normal(EPSILON, 0.004, n), 0, 1),
    "a long tail": lambda rng, n: np.where(rng.random(n) < 2 * EPSILON, rng.random(n), 0.0),
}
"""Losses whose mean is ε exactly, or a hair above: to grant it is a mistake."""


@pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name in BOUNDS for world in WORLDS if name != "binomial" or "or" in world]
)
def test_a_risk_that_is_no_smaller_is_granted_no_more_often_than_promised(name: str, world: str) -> None:
    draws, n = 2000, 300
    rng = np.random.default_rng(3)
    granted = sum(bool(BOUNDS[name](WORLDS[world](rng, n), EPSILON, DELTA)[-1]) for _ in range(draws))
    assert granted <= binom.ppf(1 - 1e-6, draws, DELTA), f"{granted} of {draws}"


@pytest.mark.parametrize("name", BOUNDS)
def test_a_risk_of_nearly_nothing_is_granted(name: str) -> None:
    assert BOUNDS[name](np.zeros(2000), EPSILON, DELTA).all()


def test_betting_gains_from_small_variance_where_the_others_cannot() -> None:
    steady = np.full(800, 0.8 * EPSILON)
    assert BOUNDS["betting"](steady, EPSILON, DELTA)[-1]
    assert not BOUNDS["hoeffding_bentkus"](steady, EPSILON, DELTA)[-1]


LOSSES = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), min_size=2, max_size=60).map(np.array)


@settings(max_examples=100)
@given(LOSSES, st.data(), st.sampled_from(sorted(BOUNDS)))
def test_no_loss_that_grows_makes_a_bound_kinder(losses: NDArray[np.float64], data: st.DataObject, name: str) -> None:
    if name == "binomial":
        losses = np.round(losses)
    index = data.draw(st.integers(0, len(losses) - 1))
    worse = losses.copy()
    worse[index] = 1.0
    before, after = (BOUNDS[name](values, 0.3, 0.2) for values in (losses, worse))
    assert not (after & ~before).any()
    assert not (before[1:] & ~before[:-1]).any(), "and each more sample that passes can only add to what is lost"


@given(st.integers(1, 500), st.data(), st.floats(0.001, 0.5))
def test_exact_bounds_are_those_of_the_binomial_distribution(n: int, data: st.DataObject, delta: float) -> None:
    k = data.draw(st.integers(0, n))
    low, high = lower_binomial(k, n, delta), upper_binomial(k, n, delta)
    assert low <= k / n <= high
    # By definition: at the bound, what was seen (or further out) has probability delta.
    if k < n:
        assert binom.cdf(k, n, high) == pytest.approx(delta, rel=1e-6)
        assert upper_binomial(k + 1, n, delta) > high
    if k > 0:
        assert binom.sf(k - 1, n, low) == pytest.approx(delta, rel=1e-6)
        assert lower_binomial(k - 1, n, delta) < low


def test_exact_bounds_agree_with_published_values() -> None:
    # Clopper and Pearson's 95 % limits for 10 of 100 (two-sided, so 2.5 % a side): 4.9 % and 17.6 %.
    assert lower_binomial(10, 100, 0.025) == pytest.approx(0.0490, abs=5e-5)
    assert upper_binomial(10, 100, 0.025) == pytest.approx(0.1762, abs=5e-5)
    # Without an error it has a closed form.
    assert upper_binomial(0, 1000, 0.05) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-9)


def test_the_curve_of_a_bound_is_the_bound() -> None:
    losses = np.array([0.0] * 150 + [1.0] * 10)
    curve = upper(BOUNDS["binomial"], losses, DELTA)
    exact = [upper_binomial(max(0, count - 150), 160, DELTA) for count in range(1, 161)]
    assert (curve >= np.array(exact)).all()
    assert curve == pytest.approx(exact, abs=0.003)


@pytest.mark.parametrize("name", BOUNDS)
def test_the_fewest_samples_are_just_enough(name: str) -> None:
    for epsilon, delta in ((0.02, 0.05), (0.01, 0.05), (0.2, 0.3)):
        needed = samples_needed(epsilon, delta, name)
        assert BOUNDS[name](np.zeros(needed), epsilon, delta)[0]
        assert not BOUNDS[name](np.zeros(needed - 1), epsilon, delta)[0]
        check_level(needed, epsilon, delta, name)
        with pytest.raises(InvalidInput, match=f"at least {needed}"):
            check_level(needed - 1, epsilon, delta, name)


@pytest.mark.parametrize(("epsilon", "delta", "needed"), [(0.02, 0.05, 149), (0.01, 0.05, 299), (0.001, 0.01, 4603)])
def test_what_an_exact_bound_needs_is_known(epsilon: float, delta: float, needed: int) -> None:
    assert samples_needed(epsilon, delta) == needed


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.05), (1.0, 0.05), (0.02, 0.0), (0.02, 1.0), (math.nan, 0.05)])
def test_levels_outside_zero_and_one_are_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        check_level(500, epsilon, delta)


def test_the_kind_of_losses_says_which_bound() -> None:
    assert for_losses(np.array([0.0, 1.0, 1.0])) == "binomial"
    assert for_losses(np.array([0.0, 0.5])) == "betting"
