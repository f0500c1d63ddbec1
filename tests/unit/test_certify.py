"""The guarantee for two models: what it says is what the device will do."""

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from hedgerow.errors import InvalidInput
from hedgerow.gate import Gate, covers
from hedgerow_cloud.certify.bounds import upper_binomial
from hedgerow_cloud.certify.guarantee import Provenance, Sample, best_gate, candidates, certify, escalated, sample
from hedgerow_cloud.certify.risks import RISKS

PROVENANCE = Provenance(
    calibration_sha256="c" * 64,
    student_sha256="s" * 64,
    teacher_sha256="t" * 64,
    engine="onnxruntime",
    precision="int8",
)
DISAGREEMENT = RISKS["disagreement"]


def logits(rng: np.random.Generator, n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    teacher = rng.normal(size=(n, 10)).astype(np.float32) * 4
    return teacher + rng.normal(size=(n, 10)).astype(np.float32), teacher


def test_the_guarantee_says_what_the_device_will_do() -> None:
    student, teacher = logits(np.random.default_rng(0), 800)
    guarantee = certify(sample(student, teacher, DISAGREEMENT), PROVENANCE, epsilon=0.02, delta=0.05)
    passed = guarantee.gate.scores(student) >= guarantee.gate.threshold
    disagree = student.argmax(1) != teacher.argmax(1)
    assert 0 < passed.sum() < 800
    assert guarantee.escalated == pytest.approx(1 - passed.mean())
    assert guarantee.errors == (passed & disagree).sum()
    assert upper_binomial(int(guarantee.errors), 800, 0.05) <= 0.02
    assert guarantee.thresholds["0.02"] == guarantee.gate.threshold
    assert [float(level) for level in guarantee.thresholds] == [0.005, 0.01, 0.02, 0.03, 0.05, 0.1]
    assert list(guarantee.thresholds.values()) == sorted(guarantee.thresholds.values(), reverse=True)
    assert (guarantee.samples, guarantee.student_sha256, guarantee.teacher_sha256) == (800, "s" * 64, "t" * 64)
    margin = certify(
        sample(student, teacher, DISAGREEMENT),
        PROVENANCE,
        epsilon=0.02,
        delta=0.05,
        gate=Gate(score="margin", threshold=0, temperature=2.0),
    )
    assert (margin.gate.score, margin.gate.temperature) == ("margin", 2.0)


def test_levels_that_the_calibration_set_is_too_small_for_are_left_out_of_the_table() -> None:
    student, teacher = logits(np.random.default_rng(1), 200)
    guarantee = certify(sample(student, teacher, DISAGREEMENT), PROVENANCE, epsilon=0.05, delta=0.05)
    assert list(guarantee.thresholds) == ["0.02", "0.03", "0.05", "0.1"]


def test_an_answer_that_is_not_finite_never_counts_as_agreement() -> None:
    student, teacher = logits(np.random.default_rng(2), 300)
    student[:] = teacher
    student[:40, 3] = np.nan
    guarantee = certify(sample(student, teacher, DISAGREEMENT), PROVENANCE, epsilon=0.02, delta=0.05)
    assert guarantee.gate.threshold > 0
    assert guarantee.escalated == pytest.approx(40 / 300)
    with pytest.raises(InvalidInput, match="teacher's logits are not all finite"):
        certify(sample(teacher, student, DISAGREEMENT), PROVENANCE, epsilon=0.02, delta=0.05)


def test_accuracy_lost_counts_only_what_the_large_model_would_have_got_right() -> None:
    right, wrong = np.eye(2), np.eye(2)[::-1]
    labels = np.array([0, 1])
    losses = {
        (small, large): RISKS["accuracy"].loss(one, other, labels).tolist()
        for small, one in (("right", right), ("wrong", wrong))
        for large, other in (("right", right), ("wrong", wrong))
    }
    assert losses == {
        ("right", "right"): [0, 0],
        ("right", "wrong"): [0, 0],
        ("wrong", "right"): [1, 1],
        ("wrong", "wrong"): [0, 0],
    }
    with pytest.raises(InvalidInput, match="there are none"):
        RISKS["accuracy"].loss(right, right, None)
    with pytest.raises(InvalidInput, match=r"labels must have shape \(2,\)"):
        sample(right, right, RISKS["accuracy"], np.array([0, 1, 1]))


def test_a_selective_guarantee_covers_the_thresholds_that_were_tested_and_no_others() -> None:
    student, teacher = logits(np.random.default_rng(3), 4000)
    risk = RISKS["selective"]
    found = certify(sample(student, teacher, risk), PROVENANCE, epsilon=0.05, delta=0.2, risk=risk)
    assert found.tested
    assert covers(found, replace(found.gate, threshold=found.tested[0]))
    between = (found.tested[0] + found.tested[1]) / 2
    assert not covers(found, replace(found.gate, threshold=between))
    marginal = certify(sample(student, teacher, DISAGREEMENT), PROVENANCE, epsilon=0.05, delta=0.2)
    assert covers(marginal, replace(marginal.gate, threshold=(1 + marginal.gate.threshold) / 2))


def test_the_score_that_ranks_failures_best_is_chosen() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3000, 5)) * 3
    large = rng.random(3000) < 0.5
    logits[large] += 20.0  # which softmax does not see, and which says here that the answer is right
    losses = np.where(large, 0.0, rng.random(3000) < 0.4)
    gates = candidates(Gate(threshold=0))
    assert {gate.score for gate in gates} == {"max_probability", "margin", "entropy", "energy"}
    assert best_gate(Sample(logits, losses), gates).score == "energy"


def test_the_table_says_what_each_level_sends_to_the_cloud() -> None:
    data = sample(*logits(np.random.default_rng(5), 800), DISAGREEMENT)
    found = certify(data, PROVENANCE, epsilon=0.02, delta=0.05)
    shares = escalated(found, data)
    assert shares["0.02"] == pytest.approx(found.escalated)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
