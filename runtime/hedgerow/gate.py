"""The gate: is this answer good enough to return?

Pure: no IO, no clock. Invariants:

- a score is in [0, 1] and larger means more confident; NaN and infinities in an answer score 0;
- an answer passes if and only if its score is at least the threshold;
- a guarantee binds only the exact student, teacher, engine and precision that it was measured on.
"""

import msgspec


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """How answers are judged: `score` by name over the output called `output`, passed at `threshold` or above."""

    score: str = "max_probability"
    output: str = "logits"
    threshold: float
    temperature: float = 1.0


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
