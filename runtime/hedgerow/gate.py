"""The gate: is this answer good enough to return?

Pure: no IO, no clock. Invariants:

- a score is in [0, 1] and larger means more confident; NaN and infinities in an answer score 0;
- an answer passes if and only if its score is at least the threshold;
- a guarantee binds only the exact student, teacher, engine and precision that it was measured on.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hedgerow import scores
from hedgerow.tensors import InferResponse


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """How answers are judged: `score` by name over the output called `output`, passed at `threshold` or above."""

    score: str = "max_probability"
    output: str = "logits"
    threshold: float
    temperature: float = 1.0
    probabilities: bool = False
    """Whether the output holds probabilities; else logits, which softmax makes into some."""
    options: dict[str, float] = {}
    """What the score is told besides (`hedgerow.scores`), where not what it takes for granted."""

    def __post_init__(self) -> None:
        try:
            kind = scores.load(self.score)
        except LookupError as error:
            raise ValueError(str(error)) from None
        for name, value in self.options.items():
            if name not in kind.options:
                raise ValueError(f"the score {self.score!r} has no option {name!r}; it has: {', '.join(kind.options)}")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"the option {name!r} must be above 0, not {value}")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be above 0, not {self.temperature}")

    def __hash__(self) -> int:
        return hash((self.score, self.output, self.threshold, self.temperature))

    def scores(self, output: NDArray[Any]) -> NDArray[np.float64]:
        """The score of each row of `output`, as the score counts rows (`scores.Reading`).

        A row with a NaN or an infinity scores 0, and so do rows of fewer than two classes, which say nothing.
        """
        kind = scores.load(self.score)
        if kind.classes:
            classes = output.shape[-1] if output.ndim else 0
            if classes < 2:
                return np.zeros(output.size // max(classes, 1))
            rows = output.reshape(-1, classes).astype(np.float64)
        else:
            rows = np.atleast_1d(output).astype(np.float64)
            if not rows.size:  # nothing was said
                return np.zeros(len(rows))
        sound = np.isfinite(rows)
        broken = None if sound.all() else ~sound.reshape(len(rows), -1).all(axis=1)
        if broken is not None:
            rows[broken] = 0.0
        options = {**kind.options, **self.options} if kind.options else kind.options
        found = kind.score(scores.Reading(rows, self.temperature, self.probabilities, options))
        found = np.minimum(np.maximum(found, 0.0), 1.0)
        if broken is not None:
            found[broken] = 0.0
        return found

    def passes(self, confidence: float) -> bool:
        """Whether an answer of that confidence is good enough."""
        return confidence >= self.threshold


class Guarantee(msgspec.Struct, frozen=True, kw_only=True):
    """The signed statement behind a threshold.

    With confidence 1 - `delta` over the draw of the calibration set, the `risk` is at most `epsilon` at
    `gate.threshold`. A marginal risk, of all requests, is so at every larger threshold as well; a selective one, of
    those that the gate passes, only at those that were `tested`. `thresholds` maps other values of epsilon to theirs.
    """

    gate: Gate
    risk: str
    epsilon: float
    delta: float
    bound: str
    samples: int
    """Size of the calibration set."""
    errors: float
    """What is lost on it by answers that the gate passes; of a risk of yes and no, how many those are."""
    escalated: float
    """Share of it that the gate sends on."""
    thresholds: dict[str, float]
    tested: tuple[float, ...] = ()
    """Of a selective risk: the thresholds at which the promise holds."""
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
        rows = _scores(gate, response, response.output(gate.output))
    except KeyError:
        return 0.0
    if len(rows) == 1:
        return rows.item()
    return float(rows.min()) if rows.size else 0.0


def _scores(gate: Gate, response: InferResponse, output: NDArray[Any]) -> NDArray[np.float64]:
    """The scores of `output`, worked out for all answers of its run at once, which costs about as much as for one."""
    if response.run is None:
        return gate.scores(output)
    known: NDArray[np.float64] | None = response.run.notes.get(gate)
    whole = response.run.outputs[gate.output]
    if known is None:
        known = response.run.notes[gate] = gate.scores(whole)
    each = known.size // max(1, len(whole))
    return known[response.first * each : (response.first + len(output)) * each]


def covers(guarantee: Guarantee, gate: Gate) -> bool:
    """Whether `guarantee` holds for answers that `gate` passes: its own gate, at a threshold that it promises for."""
    own = guarantee.gate
    if msgspec.structs.replace(gate, threshold=own.threshold) != own:
        return False
    if guarantee.tested:
        return gate.threshold in guarantee.tested
    return gate.threshold >= own.threshold


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
