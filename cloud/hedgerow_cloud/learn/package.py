"""Writing a release folder: the model's file, probe vectors, a card for people, and the manifest over them."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hedgerow import release
from hedgerow.gate import Guarantee
from hedgerow.release import Manifest, Probes, Variant

STUDENT: Final = "student.int8.onnx"
PROBES: Final = "probes.npz"
CARD: Final = "MODEL_CARD.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the model card says beyond the guarantee. Accuracies are on the calibration set, shares are from 0 to 1."""

    seed: int
    splits: Mapping[str, int]
    """How many examples each split has."""
    teacher_parameters: int
    teacher_bytes: int
    teacher_accuracy: float
    student_parameters: int
    student_bytes: int
    student_accuracy: float
    """Of the int8 file."""
    agreement: float
    """Share of answers that quantization left as they were."""
    learned_from: int
    """Images that the student was trained on."""
    field: int
    """How many of those came in from the field for this release."""


def write(
    folder: Path,
    student: Path,
    *,
    model: str,
    counter: int,
    guarantee: Guarantee,
    probes: Mapping[str, NDArray[Any]],
    atol: float,
    facts: Facts,
    labels: tuple[str, ...],
) -> Manifest:
    """Write the release into `folder`, in place of what was there, and read it back.

    `probes` are the arrays of probes.npz; `atol` is how far an output may be from the expected one.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(student, folder / STUDENT)
    np.savez(folder / PROBES, **probes)  # type: ignore[arg-type]  # numpy's stub takes the names for allow_pickle
    (folder / CARD).write_text(card(f"{model}/{counter}", guarantee, facts), encoding="utf-8")
    manifest = Manifest(
        format=release.FORMAT,
        model=model,
        counter=counter,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        variants=(
            Variant(
                name=guarantee.precision,
                engine=guarantee.engine,
                precision=guarantee.precision,
                file=STUDENT,
                guarantee=guarantee,
            ),
        ),
        files=tuple(release.describe(folder, path) for path in (STUDENT, PROBES, CARD)),
        probes=Probes(file=PROBES, atol=atol),
        card=CARD,
        labels=labels,
    )
    (folder / release.MANIFEST).write_bytes(manifest.encode())
    return release.read(folder)


def card(name: str, guarantee: Guarantee, facts: Facts) -> str:
    """The model card of release `name`, in Markdown."""
    splits = ", ".join(f"{size} {split}" for split, size in facts.splits.items())
    table = "\n".join(
        f"| {float(epsilon):.1%} | {'none' if threshold > 1 else f'{threshold:.4f}'} |"
        for epsilon, threshold in guarantee.thresholds.items()
    )
    student = f"{facts.student_parameters:,} | {facts.student_bytes:,} bytes | {facts.student_accuracy:.2%}"
    teacher = f"{facts.teacher_parameters:,} | {facts.teacher_bytes:,} bytes | {facts.teacher_accuracy:.2%}"
    return f"""# {name}

A small classifier of handwritten digits for devices, with a gate that says which of its answers stand without asking
the large one (the teacher).

| | parameters | file | accuracy on the calibration set |
| --- | --- | --- | --- |
| student, {guarantee.precision} | {student} |
| teacher | {teacher} |

Input `image`: FP32, shape [-1, 64], 8x8 pixels row by row, from 0 (paper) to 1 (ink). Output `logits`: FP32, shape
[-1, 10]. Quantized to {guarantee.precision} (QDQ, a scale a channel, 7-bit weights so that CPUs without VNNI do not
saturate); {facts.agreement:.2%} of the answers are those of the full-precision student.

## Data

scikit-learn's handwritten digits, 1,797 scans, split by seed {facts.seed}: {splits}.
No image is in two splits. The student learned the teacher's probabilities on {facts.learned_from} images,
{facts.field} of them sent in from the field for this release. Calibration and held-out images were kept from it.

## Guarantee

With {1 - guarantee.delta:.0%} confidence, at most {guarantee.epsilon:.2%} of all requests get an answer from the
student that the teacher would have answered differently, as long as only answers with a {guarantee.score_name}
of at least {guarantee.gate.threshold:.4f} are returned. On the {guarantee.samples} calibration images the gate
returns {1 - guarantee.escalated:.1%} of the answers; {guarantee.errors:g} images get one unlike the teacher's.
Exact binomial bound (Clopper-Pearson), walked down from the strictest threshold (risk-controlling prediction sets).

| disagreement at most | threshold |
| --- | --- |
{table}

Each line holds with that confidence by itself.

## Limits of the guarantee

- It compares with the teacher, not with the truth: where the teacher errs, agreeing with it is an error too.
- It is a share of all requests. Among the answers that the gate returns, the share that differs may be larger: by one
  over the share returned.
- The confidence is over the draw of the calibration set: one set in {round(1 / guarantee.delta)} may be an unlucky one.
- It holds for traffic like the calibration images. When the world drifts, it no longer says anything.
- It binds the exact files, engine and precision named in the manifest.
- Releases of one pipeline are certified on the same calibration images. No student is trained on them, but which
  samples of the field a later student learned from was decided by an earlier gate, whose threshold was chosen on them.
  Each release's guarantee stands by itself; that several hold at once has a confidence of at least one minus the sum of
  their δ. A fresh calibration set for each release takes that dependence away.

## Files

Student {guarantee.student_sha256}
Teacher {guarantee.teacher_sha256}
Calibration set {guarantee.calibration_sha256}
"""
