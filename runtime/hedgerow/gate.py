"""The gate: is this answer good enough to return?

Pure: no IO, no clock. Invariants:

- a score is in [0, 1] and larger means more confident; NaN and infinities in an answer score 0;
- an answer passes if and only if its score is at least the threshold;
- a guarantee binds only the exact student, teacher, engine and precision that it was measured on.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hedgerow.tensors import InferResponse

Probabilities = NDArray[np.float64]
"""Shape (n, classes), rows summing to 1."""


def max_probability(probabilities: Probabilities) -> NDArray[np.float64]:
    """The largest class probability of each row (Hendrycks and Gimpel 2017)."""
    return np.asarray(np.maximum.reduce(probabilities, axis=1))


def margin(probabilities: Probabilities) -> NDArray[np.float64]:
    """How far the most likely class of each row is ahead of the second."""
    two = np.partition(probabilities, -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])


def entropy(probabilities: Probabilities) -> NDArray[np.float64]:
    """One minus the entropy of each row as a share of the largest possible: 0 for uniform, 1 for certain."""
    logs = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return np.asarray(1 + (probabilities * logs).sum(axis=1) / np.log(probabilities.shape[1]))


SCORES: Mapping[str, Callable[[Probabilities], NDArray[np.float64]]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}


_TINY = np.finfo(np.float64).tiny


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """How answers are judged: `score` by name over the output called `output`, passed at `threshold` or above."""

    score: str = "max_probability"
    output: str = "logits"
    threshold: float
    temperature: float = 1.0
    probabilities: bool = False
    """Whether the output holds probabilities; else logits, which softmax makes into some."""

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"there is no score {self.score!r}; there are: {', '.join(SCORES)}")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be above 0, not {self.temperature}")

    def scores(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """The score of each row of `logits`, of shape (..., classes) or (classes,), in row-major order.

        A row with a NaN or an infinity scores 0, and so do rows of fewer than two classes, which say nothing.
        """
        classes = logits.shape[-1] if logits.ndim else 0
        if classes < 2:
            return np.zeros(logits.size // max(classes, 1))
        # Ufuncs themselves: of a row or two, most of the time goes into numpy's wrappers around them.
        rows = logits.reshape(-1, classes).astype(np.float64)
        sound = np.isfinite(rows)
        broken = None if sound.all() else ~np.logical_and.reduce(sound, axis=1)
        if broken is not None:
            rows[broken] = 0.0
        if self.probabilities:  # their logarithms are logits
            rows = np.log(np.maximum(rows, _TINY))
        rows /= self.temperature
        rows -= np.maximum.reduce(rows, axis=1, keepdims=True)
        np.exp(rows, out=rows)
        rows /= np.add.reduce(rows, axis=1, keepdims=True)
        scores = np.minimum(np.maximum(SCORES[self.score](rows), 0.0), 1.0)
        if broken is not None:
            scores[broken] = 0.0
        return scores

    def passes(self, confidence: float) -> bool:
        """Whether an answer of that confidence is good enough."""
        return confidence >= self.threshold


class Guarantee(msgspec.Struct, frozen=True, kw_only=True):
    """The signed statement behind a threshold.

    With confidence 1 - `delta` over the draw of the calibration set, the share of all requests that the gate passes and
    the teacher would have answered differently is at most `epsilon`, at `gate.threshold` and every larger one
    (risk-controlling prediction sets, Bates et al. 2021). `thresholds` maps other values of epsilon to theirs.
    """

    gate: Gate
    risk: str
    epsilon: float
    delta: float
    bound: str
    samples: int
    """Size of the calibration set."""
    errors: int
    """Disagreements on it that the gate passes."""
    escalated: float
    """Share of it that the gate sends on."""
    thresholds: dict[str, float]
    calibration_sha256: str
    student_sha256: str
    teacher_sha256: str
    engine: str
    precision: str

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.risk} ≤ {self.epsilon:.2%} with {1 - self.delta:.0%} confidence "
            f"(n={self.samples}, {self.score_name} ≥ {self.gate.threshold:.4f})"
        )

    @property
    def score_name(self) -> str:
        """The score's name, for people."""
        return self.gate.score.replace("_", " ")


def confidence(gate: Gate, response: InferResponse) -> float:
    """How sure `response` is, in [0, 1]: the lowest score of its rows.

    A batch in one request is one answer: it is returned or escalated whole, so it is as good as its worst row, and
    the guarantee holds for every row that passes. No rows, or no such output, score 0: nothing was claimed that could
    be trusted.
    """
    try:
        scores = _scores(gate, response, response.output(gate.output))
    except KeyError:
        return 0.0
    if len(scores) == 1:
        return scores.item()
    return float(scores.min()) if scores.size else 0.0


def _scores(gate: Gate, response: InferResponse, output: NDArray[Any]) -> NDArray[np.float64]:
    """The scores of `output`, worked out for all answers of its run at once, which costs about as much as for one."""
    if response.run is None:
        return gate.scores(output)
    scores: NDArray[np.float64] | None = response.run.notes.get(gate)
    whole = response.run.outputs[gate.output]
    if scores is None:
        scores = response.run.notes[gate] = gate.scores(whole)
    each = scores.size // max(1, len(whole))
    return scores[response.first * each : (response.first + len(output)) * each]


def covers(guarantee: Guarantee, gate: Gate) -> bool:
    """Whether `guarantee` holds for answers that `gate` passes: its own gate, at its threshold or any larger one."""
    own = guarantee.gate
    return msgspec.structs.replace(gate, threshold=own.threshold) == own and gate.threshold >= own.threshold


def mismatch(guarantee: Guarantee, student: Mapping[str, str], teacher: Mapping[str, str]) -> str:
    """Why `guarantee` does not bind these two models, given their metadata's properties; empty if it does.

    A teacher that does not say its digest is not held against it: a foreign server may have no way to.
    """
    facts = (
        ("the student's digest", guarantee.student_sha256, student.get("sha256", "")),
        ("the engine", guarantee.engine, student.get("engine", "")),
        ("the precision", guarantee.precision, student.get("precision", "")),
        ("the teacher's digest", guarantee.teacher_sha256, teacher.get("sha256") or guarantee.teacher_sha256),
    )
    for what, measured, found in facts:
        if found != measured:
            return (
                f"the guarantee was measured on another model: {what} is {found[:12] or 'unknown'}, not {measured[:12]}"
            )
    return ""
