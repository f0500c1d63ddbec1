"""A guarantee as the pipeline would sign it, for two models that a test makes up."""

from hedgerow.gate import Gate, Guarantee


def guarantee(gate: Gate, *, student: str = "s" * 64, teacher: str = "t" * 64, precision: str = "fp32") -> Guarantee:
    """Behind `gate`, for the files with these digests."""
    return Guarantee(
        gate=gate,
        risk="disagreement with the teacher",
        epsilon=0.01,
        delta=0.05,
        bound="binomial",
        samples=1000,
        errors=3,
        escalated=0.2,
        thresholds={},
        calibration_sha256="c" * 64,
        student_sha256=student,
        teacher_sha256=teacher,
        engine="onnxruntime",
        precision=precision,
    )
