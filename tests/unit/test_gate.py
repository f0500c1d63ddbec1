"""What the gate lets through: scores, thresholds, batches, and what a guarantee binds."""

import math
import pickle

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from msgspec.structs import replace
from numpy.typing import NDArray
from simulators.guarantees import guarantee

from hedgerow.gate import Gate, confidence, covers, mismatch
from hedgerow.tensors import InferResponse, Run, tensor

LOGITS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0]),
)
GATE = Gate(threshold=0.8)
CLASSES = ["energy", "entropy", "margin", "max_probability"]


def answer(logits: NDArray[np.float32]) -> InferResponse:
    return InferResponse(model="digits", version="1", outputs=(tensor("logits", logits),))


@given(logits=LOGITS, score=st.sampled_from(CLASSES), temperature=st.floats(0.01, 100))
def test_scores_are_in_the_unit_interval_and_zero_for_what_is_not_finite(
    logits: NDArray[np.float32], score: str, temperature: float
) -> None:
    scores = Gate(score=score, threshold=0.5, temperature=temperature).scores(logits)
    assert scores.shape == (len(logits),)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (scores[~np.isfinite(logits).all(axis=1)] == 0).all()


@given(logits=LOGITS, score=st.sampled_from(CLASSES))
def test_a_batch_is_as_good_as_its_worst_row_and_rows_do_not_mix(logits: NDArray[np.float32], score: str) -> None:
    gate = Gate(score=score, threshold=0.5)
    each = [confidence(gate, answer(row[None])) for row in logits]
    assert confidence(gate, answer(logits)) == pytest.approx(min(each))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("max_probability", 0.7),
        ("margin", 0.5),
        ("entropy", 1 + (0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)),
    ],
)
def test_scores_are_what_their_names_say(score: str, expected: float) -> None:
    logits = np.log(np.array([0.2, 0.7, 0.1])) + 5.0
    assert Gate(score=score, threshold=0).scores(logits) == pytest.approx([expected])
    softened = Gate(score=score, threshold=0, temperature=2.0).scores(logits)
    assert softened < expected
    assert softened == pytest.approx(Gate(score=score, threshold=0).scores(logits / 2.0))


@pytest.mark.parametrize("score", CLASSES)
def test_no_claim_scores_zero(score: str) -> None:
    gate = Gate(score=score, threshold=0.5)
    one_class = np.array([[7.0], [9.0]], np.float32)
    assert (gate.scores(one_class) == 0).all()
    assert confidence(gate, answer(np.zeros((0, 10), np.float32))) == 0
    assert confidence(gate, answer(np.zeros((3, 0), np.float32))) == 0
    assert confidence(gate, InferResponse(model="digits", version="1", outputs=())) == 0


@given(
    logits=arrays.arrays(np.float64, (3, 4), elements=st.floats(-20, 20)),
    score=st.sampled_from(CLASSES[1:]),
)
def test_probabilities_score_as_the_logits_that_they_come_from(logits: NDArray[np.float64], score: str) -> None:
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    of_logits, of_probabilities = (
        Gate(score=score, threshold=0.5, temperature=2.0, probabilities=given) for given in (False, True)
    )
    assert np.allclose(of_probabilities.scores(probabilities), of_logits.scores(logits), atol=1e-6)
    assert not covers(guarantee(of_logits), of_probabilities)


def test_the_threshold_itself_passes() -> None:
    assert GATE.passes(0.8)
    assert not GATE.passes(math.nextafter(0.8, 0))


def test_answers_are_not_changed_by_being_judged() -> None:
    logits = np.array([[1.0, math.nan], [2.0, 3.0]])
    before = logits.copy()
    GATE.scores(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("wrong", [{"score": "vibes"}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_a_gate_that_cannot_judge_is_refused_where_it_is_read(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"threshold": 0.5, **wrong}, Gate)


@pytest.mark.parametrize(
    ("changes", "covered"),
    [
        ({}, True),
        ({"threshold": 0.9}, True),
        ({"threshold": 0.79}, False),
        ({"threshold": math.nan}, False),
        ({"score": "margin", "threshold": 0.9}, False),
        ({"temperature": 2.0}, False),
        ({"output": "other"}, False),
    ],
)
def test_a_guarantee_covers_its_own_gate_and_stricter_ones(changes: dict[str, object], covered: bool) -> None:
    assert covers(guarantee(GATE), msgspec.structs.replace(GATE, **changes)) is covered


@pytest.mark.parametrize(
    ("student", "teacher", "word"),
    [
        ({}, {}, ""),
        ({}, {"sha256": "t" * 64}, ""),
        ({"sha256": "x" * 64}, {}, "student"),
        ({"sha256": ""}, {}, "unknown"),
        ({"engine": "openvino"}, {}, "openvino"),
        ({"precision": "fp32"}, {}, "precision"),
        ({}, {"sha256": "x" * 64}, "teacher"),
    ],
)
def test_a_guarantee_binds_what_it_was_measured_on_and_nothing_else(
    student: dict[str, str], teacher: dict[str, str], word: str
) -> None:
    own = {"sha256": "s" * 64, "engine": "onnxruntime", "precision": "int8"}
    problem = mismatch(guarantee(GATE, precision="int8"), own | student, teacher)
    assert word in problem
    assert bool(problem) is bool(word)


def test_answers_of_a_run_without_rows_claim_nothing() -> None:
    empty = np.zeros((0, 10), np.float32)
    assert confidence(GATE, replace(answer(empty), run=Run({"logits": empty}))) == 0


@given(LOGITS, st.data())
def test_an_answer_scores_the_same_alone_and_among_those_of_its_run(
    logits: NDArray[np.float32], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(logits)))
    last = data.draw(st.integers(first, len(logits)))
    alone, run = answer(logits[first:last]), Run({"logits": logits})
    beside = replace(alone, run=run, first=first)
    for _ in range(2):
        assert confidence(GATE, beside) == confidence(GATE, alone)
    assert list(run.notes) == [GATE]
    assert pickle.loads(pickle.dumps(beside)).run is None
