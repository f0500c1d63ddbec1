"""Scores: numbers from 0 to 1, a row by itself, and wrong answers lower than right ones."""

import math
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from hedgerow import scores
from hedgerow.gate import Gate
from hedgerow.scores import Reading, known, load

VALUES = arrays.arrays(
    np.float64,
    arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
    elements=st.floats(-(2.0**100), 2.0**100) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 0.5, 1.0]),
)
NAMES = st.sampled_from(known())


def scored(name: str, values: object, **options: float) -> list[float]:
    found: list[float] = Gate(score=name, threshold=0.5, options=options).scores(np.array(values)).tolist()
    return found


@given(VALUES, NAMES)
def test_a_score_is_in_the_unit_interval_whatever_it_is_shown(values: NDArray[np.float64], name: str) -> None:
    found = Gate(score=name, threshold=0.5).scores(values)
    assert found.ndim == 1
    assert ((found >= 0) & (found <= 1)).all()


@given(arrays.arrays(np.float64, (4, 3, 2), elements=st.floats(-10, 10)), NAMES)
def test_rows_do_not_mix(values: NDArray[np.float64], name: str) -> None:
    gate = Gate(score=name, threshold=0.5)
    together = gate.scores(values)
    apart = np.concatenate([gate.scores(row[None]) for row in values])
    assert together == pytest.approx(apart)


@given(arrays.arrays(np.float64, (5, 4), elements=st.floats(-10, 10)), NAMES)
def test_what_is_not_finite_is_not_sure(values: NDArray[np.float64], name: str) -> None:
    values[2, 1] = math.nan
    assert Gate(score=name, threshold=0.5).scores(values)[2] == 0


def test_energy_sees_how_large_logits_are_and_not_only_how_they_differ() -> None:
    faint, loud = scored("energy", [[1.0, 0.0], [11.0, 10.0]])
    assert faint < loud
    assert scored("max_probability", [[1.0, 0.0]]) == pytest.approx(scored("max_probability", [[11.0, 10.0]]))


def test_a_picture_in_which_nothing_is_found_is_judged_by_what_was_nearly_reported() -> None:
    clear, doubtful = scored("detection", [[0.02, 0.0, 0.01], [0.45, 0.0, 0.01]])
    assert clear == pytest.approx(0.98)
    assert doubtful == pytest.approx(0.55)


def test_a_picture_is_as_sure_as_its_least_sure_claim() -> None:
    one_is_doubtful, one_was_left_out = scored("detection", [[0.99, 0.6], [0.99, 0.4]])
    assert one_is_doubtful == pytest.approx(0.6)
    assert one_was_left_out == pytest.approx(0.6)
    assert scored("detection", [[0.99, 0.4]], reported=0.3) == pytest.approx([0.4])


def test_a_detector_without_any_candidates_is_not_sure_that_there_is_nothing() -> None:
    assert scored("detection", np.zeros((2, 0))) == [0, 0]


def test_heads_that_agree_are_surer_and_one_alone_is_not_sure() -> None:
    agree, differ = scored("heads", [[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    assert agree == 1
    assert differ == pytest.approx(1 / (1 + np.std([0, 1, 2])))
    assert scored("heads", [[3.0]]) == [0]
    # Of several values the one on which they agree the least counts, in units of the scale.
    assert scored("heads", [[[1.0, 0.0], [1.0, 4.0]]], scale=2.0) == pytest.approx([1 / (1 + 2.0 / 2.0)])


def test_narrow_intervals_are_surer_and_crossed_ones_say_nothing() -> None:
    narrow, wide, crossed = scored("quantiles", [[1.0, 1.5, 2.0], [0.0, 2.0, 4.0], [0.0, 3.0, 2.0]])
    assert narrow == pytest.approx(1 / 2)
    assert wide == pytest.approx(1 / 5)
    assert crossed == 0


def test_a_sequence_is_as_likely_as_its_mean_token_however_long_it_is() -> None:
    all_alike, one_certain = scored("sequence", np.log([[0.5, 0.5, 0.5], [0.5, 0.5, 1]]))
    assert all_alike == pytest.approx(0.5)
    assert one_certain == pytest.approx(0.25 ** (1 / 3))
    ended_early = [[math.log(0.5), math.log(0.5), 1.0]]  # no log-probability is above 0
    assert scored("sequence", ended_early) == pytest.approx([0.5])
    assert scored("sequence", [[1.0, 1.0]]) == [0]


def test_an_unknown_score_and_an_unknown_option_are_named() -> None:
    with pytest.raises(ValueError, match=r"no score 'vibes'; there are: .*max_probability"):
        Gate(score="vibes", threshold=0.5)
    with pytest.raises(ValueError, match="'detection' has no option 'iou'; it has: reported"):
        Gate(score="detection", threshold=0.5, options={"iou": 0.5})
    with pytest.raises(ValueError, match="must be above 0"):
        Gate(score="detection", threshold=0.5, options={"reported": math.nan})


def halves(reading: Reading) -> NDArray[np.float64]:
    """A score of somebody else's."""
    return np.full(len(reading.values), 0.5)


def test_a_package_of_ones_own_may_bring_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("halves", f"{__name__}:halves", scores.GROUP)
    monkeypatch.setattr(scores, "_declared", lambda: {"halves": point})
    load.cache_clear()
    assert "halves" in known()
    assert scored("halves", [[1.0], [2.0]]) == [0.5, 0.5]
    load.cache_clear()
