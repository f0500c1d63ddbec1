"""From calibration data to a gate with a guarantee. Pure: arrays in, no IO, no models.

With e the small model, c the large one, s the score of e's answer and λ the gate's threshold, the risk is the marginal
disagreement R(λ) = P(s ≥ λ and e ≠ c), over all requests. It never grows with λ. `choose` walks λ down from the top
and stops before the first one whose upper confidence bound exceeds ε; since every test before it passed and R is
monotone, R(λ) ≤ ε with probability at least 1 - δ (fixed-sequence testing; Bates et al. 2021, "Distribution-free,
risk-controlling prediction sets"; the bound is the exact one of Clopper and Pearson 1934). Conditions:

- the calibration examples are independent draws from the traffic that the gate will meet, and neither model, nor the
  score, was fitted to them;
- the guarantee is about the draw of the calibration set; each ε of a table holds at 1 - δ by itself, not all at once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from hedgerow.errors import InvalidInput
from hedgerow.gate import Gate, Guarantee

RISK: Final = "disagreement with the teacher"
BOUND: Final = "clopper-pearson"
TABLE: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
"""The ε for which a guarantee lists thresholds, as far as the calibration set is large enough for them."""
NOTHING_PASSES: Final = math.nextafter(1.0, 2.0)
"""The threshold above every score: what is left when no other keeps the risk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A threshold and what it was chosen on."""

    threshold: float
    epsilon: float
    delta: float
    samples: int
    passed: int
    """How many of the samples score at or above the threshold."""
    errors: int
    """How many of those disagree."""

    @property
    def escalated(self) -> float:
        """Share of the samples below the threshold."""
        return 1 - self.passed / self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What exactly was measured: digests (hex SHA-256) of the data and both model files, and how the small one ran."""

    calibration_sha256: str
    student_sha256: str
    teacher_sha256: str
    engine: str
    precision: str


def upper_bound(errors: int, samples: int, delta: float) -> float:
    """The exact upper confidence bound, at level 1 - `delta`, on the rate behind `errors` of `samples`."""
    return 1.0 if errors >= samples else float(betaincinv(errors + 1, samples - errors, 1 - delta))


def lower_bound(errors: int, samples: int, delta: float) -> float:
    """The exact lower confidence bound, at level 1 - `delta`; above ε it says that a promise of ε was broken."""
    return 0.0 if errors <= 0 else float(betaincinv(errors, samples - errors + 1, delta))


def samples_needed(epsilon: float, delta: float) -> int:
    """The smallest calibration set with which any gate can be certified, one without a single error."""
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def check_level(samples: int, epsilon: float, delta: float) -> None:
    """Raise `InvalidInput` unless a calibration set of that size can certify `epsilon` at `delta`."""
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            raise InvalidInput(f"{name} must be between 0 and 1, not {value}")
    if samples < (needed := samples_needed(epsilon, delta)):
        raise InvalidInput(
            f"{samples} calibration samples cannot certify ε = {epsilon:g} at δ = {delta:g}: it takes at least {needed}"
        )


def choose(scores: NDArray[np.floating[Any]], disagree: NDArray[np.bool_], *, epsilon: float, delta: float) -> Choice:
    """The smallest threshold whose risk is at most `epsilon` with confidence 1 - `delta`, and so at every larger one.

    `scores` in [0, 1] and `disagree` have shape (n,). Raises `InvalidInput` for other arrays, for `epsilon` or `delta`
    outside (0, 1), and if n is too small for any threshold, saying how many samples it takes.
    """
    if scores.ndim != 1 or scores.shape != disagree.shape:
        raise InvalidInput(
            f"scores and disagreements must be of one shape (n,), not {scores.shape} and {disagree.shape}"
        )
    if disagree.dtype != np.bool_:
        raise InvalidInput(f"disagreements must be booleans, not {disagree.dtype}")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise InvalidInput("scores must be numbers from 0 to 1")
    samples = len(scores)
    check_level(samples, epsilon, delta)
    # The bound depends on the number of errors alone, so the walk ends at the first score that brings one too many.
    allowed = 0
    while upper_bound(allowed + 1, samples, delta) <= epsilon:
        allowed += 1
    order = np.argsort(-scores, kind="stable")
    ranked, errors = scores[order], np.cumsum(disagree[order])
    # Equal scores pass or fail together: only the last of each run is a threshold.
    ends = np.flatnonzero(np.append(ranked[:-1] != ranked[1:], True))
    good = ends[errors[ends] <= allowed]
    if not good.size:
        return Choice(threshold=NOTHING_PASSES, epsilon=epsilon, delta=delta, samples=samples, passed=0, errors=0)
    last = int(good[-1])
    return Choice(
        threshold=float(ranked[last]),
        epsilon=epsilon,
        delta=delta,
        samples=samples,
        passed=last + 1,
        errors=int(errors[last]),
    )


def certify(
    student: NDArray[Any],
    teacher: NDArray[Any],
    provenance: Provenance,
    *,
    epsilon: float,
    delta: float,
    gate: Gate | None = None,
    table: Iterable[float] = TABLE,
) -> Guarantee:
    """The guarantee for two models whose logits on the same calibration inputs are given, each of shape (n, classes).

    `gate` says how answers are scored (its threshold is replaced). Rows of the student that are not finite count as
    disagreements. Raises `InvalidInput` as `choose` does, and if the teacher's logits are not all finite.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise InvalidInput(f"logits must be of one shape (n, classes), not {student.shape} and {teacher.shape}")
    if not np.isfinite(teacher).all():
        raise InvalidInput("the teacher's logits are not all finite: there is nothing to agree with")
    gate = gate or Gate(threshold=NOTHING_PASSES)
    scores = gate.scores(student)
    disagree = (student.argmax(axis=1) != teacher.argmax(axis=1)) | ~np.isfinite(student).all(axis=1)
    choice = choose(scores, disagree, epsilon=epsilon, delta=delta)
    levels = sorted({*table, epsilon})
    thresholds = {
        f"{level:g}": choose(scores, disagree, epsilon=level, delta=delta).threshold
        for level in levels
        if choice.samples >= samples_needed(level, delta)
    }
    return Guarantee(
        gate=Gate(score=gate.score, output=gate.output, threshold=choice.threshold, temperature=gate.temperature),
        risk=RISK,
        epsilon=epsilon,
        delta=delta,
        bound=BOUND,
        samples=choice.samples,
        errors=choice.errors,
        escalated=choice.escalated,
        thresholds=thresholds,
        calibration_sha256=provenance.calibration_sha256,
        student_sha256=provenance.student_sha256,
        teacher_sha256=provenance.teacher_sha256,
        engine=provenance.engine,
        precision=provenance.precision,
    )
