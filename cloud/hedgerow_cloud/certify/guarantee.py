"""The guarantee for two models whose outputs on the same calibration inputs are given. Pure.

Which score ranks failures best, and at which temperature, is chosen on samples that are then used for nothing else: a
threshold certified on the samples that its score was chosen by would promise too much.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from hedgerow import scores
from hedgerow.errors import InvalidInput
from hedgerow.gate import Gate, Guarantee
from hedgerow_cloud.certify import thresholds
from hedgerow_cloud.certify.bounds import for_losses, samples_needed
from hedgerow_cloud.certify.risks import RISKS, Risk

TABLE: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
"""The ε for which a guarantee lists thresholds, as far as the calibration set is large enough for them."""
CHOSEN_ON: Final = 0.2
"""Share of the samples that a score is chosen by, and"""
MAX_CHOSEN_ON: Final = 1000
"""how many at most."""
TEMPERATURES: Final = (0.5, 1.0, 2.0, 4.0)
"""Those that are tried for scores of classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What exactly was measured: digests (hex SHA-256) of the data and both model files, and how the small one ran."""

    calibration_sha256: str
    student_sha256: str
    teacher_sha256: str
    engine: str
    precision: str


@dataclass(frozen=True, slots=True)
class Sample:
    """The calibration set, worked out: the small model's output and what each sample loses, shape (n, ...) and (n,)."""

    output: NDArray[Any]
    losses: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.losses)

    def part(self, which: slice | NDArray[np.intp]) -> "Sample":
        """Some of it."""
        return Sample(self.output[which], self.losses[which])


def sample(
    student: NDArray[Any], teacher: NDArray[Any], risk: Risk, labels: NDArray[np.integer[Any]] | None = None
) -> Sample:
    """What `risk` makes of the outputs of both models, each of shape (n, classes).

    Raises `InvalidInput` if the shapes differ, the teacher's are not all finite, or labels are missing.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise InvalidInput(f"logits must be of one shape (n, classes), not {student.shape} and {teacher.shape}")
    if not np.isfinite(teacher).all():
        raise InvalidInput("the teacher's logits are not all finite: there is nothing to agree with")
    if labels is not None and labels.shape != (len(student),):
        raise InvalidInput(f"labels must have shape ({len(student)},), not {labels.shape}")
    return Sample(student, risk.loss(student, teacher, labels))


def candidates(gate: Gate) -> list[Gate]:
    """`gate` with each score of classes that there is, at each temperature that can make a difference to it."""
    tried = [
        msgspec.structs.replace(gate, score=name, temperature=temperature, options={})
        for name in scores.known()
        if scores.load(name).classes
        for temperature in TEMPERATURES
    ]
    return [gate, *(one for one in tried if one != gate)]


def best_gate(by: Sample, gates: Sequence[Gate]) -> Gate:
    """The one of `gates` whose score ranks failures best: the least area under risk over coverage."""
    found = thresholds.areas([gate.scores(by.output) for gate in gates], by.losses)
    return gates[int(np.argmin(found))]


def certify(
    data: Sample,
    provenance: Provenance,
    *,
    epsilon: float,
    delta: float,
    risk: Risk = RISKS["disagreement"],
    gate: Gate | None = None,
    table: Iterable[float] = TABLE,
    bound: str = "",
) -> Guarantee:
    """The guarantee that `data` bears out. `gate` says how answers are scored (its threshold is replaced).

    Raises `InvalidInput` where the data is not what it has to be, and if it is too little, saying how much it takes.
    """
    gate = gate or Gate(threshold=thresholds.NOTHING_PASSES)
    bound = bound or for_losses(data.losses)
    choose = thresholds.selective if risk.selective else thresholds.marginal
    sure = gate.scores(data.output)
    choice = choose(sure, data.losses, epsilon=epsilon, delta=delta, bound=bound)
    listed = {
        f"{level:g}": choose(sure, data.losses, epsilon=level, delta=delta, bound=bound).threshold
        for level in sorted({*table, epsilon})
        if level == epsilon or _enough(len(data), level, delta, bound, risk)
    }
    return Guarantee(
        gate=msgspec.structs.replace(gate, threshold=choice.threshold),
        risk=risk.title,
        epsilon=epsilon,
        delta=delta,
        bound=bound,
        samples=choice.samples,
        errors=choice.lost,
        escalated=choice.escalated,
        thresholds=listed,
        tested=choice.tested,
        calibration_sha256=provenance.calibration_sha256,
        student_sha256=provenance.student_sha256,
        teacher_sha256=provenance.teacher_sha256,
        engine=provenance.engine,
        precision=provenance.precision,
    )


def escalated(guarantee: Guarantee, data: Sample) -> dict[str, float]:
    """The share of `data` that each ε of the guarantee's table sends to the cloud."""
    sure = guarantee.gate.scores(data.output)
    return {level: float((sure < threshold).mean()) for level, threshold in guarantee.thresholds.items()}


def _enough(samples: int, epsilon: float, delta: float, bound: str, risk: Risk) -> bool:
    if risk.selective:
        samples, delta = int(samples * (1 - thresholds.LAID_OUT)), delta / thresholds.STARTS
    return samples >= samples_needed(epsilon, delta, bound)
