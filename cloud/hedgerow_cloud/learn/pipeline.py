"""From data to a release: train, distil, quantize, certify, write. The first time, and again with the field's samples.

A pipeline leaves in its folder::

    release/       the release, as `hedgerow.release` has it: what devices get
    teacher.onnx   the large model that the guarantee binds, to be served
    weights.pt     the student in full precision, for the next one to start from
    lesson.npz     the images that the student learned from, with the teacher's logits

It needs nothing but this machine; Ray runs for as long as the training does.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hedgerow import engines, release
from hedgerow.errors import HedgerowError
from hedgerow.gate import Guarantee
from hedgerow.proto.link_pb2 import Sample
from hedgerow.release import Manifest
from hedgerow_cloud.certify.bounds import check_level
from hedgerow_cloud.certify.guarantee import Provenance, certify, sample
from hedgerow_cloud.certify.risks import RISKS
from hedgerow_cloud.cluster import local_ray
from hedgerow_cloud.learn import data, package, quantize
from hedgerow_cloud.learn.data import Digits, Images
from hedgerow_cloud.learn.distill import Lesson, confirmed, from_samples, smoothed
from hedgerow_cloud.learn.train import INPUT, OUTPUT, Recipe, Trained, train

MODEL: Final = "digits"
ENGINE: Final = "onnxruntime"
"""The engine that guarantees are measured with."""
RELEASE: Final = "release"
TEACHER: Final = "teacher.onnx"
WEIGHTS: Final = "weights.pt"
LESSON: Final = "lesson.npz"
PROBE_COUNT: Final = 16
PROBE_STEPS: Final = 3
"""How many quantization steps a device's answer to a probe may be off."""
ENGINE_THREADS: Final = 2

LABEL_SMOOTHING: Final = 0.05
TEACHER_RECIPE: Final = Recipe(
    network="teacher", epochs=40, batch=64, learning_rate=3e-3, weight_decay=1e-3, augment=True
)
STUDENT_RECIPE: Final = Recipe(network="student", epochs=60, batch=32, learning_rate=2e-3, weight_decay=1e-2)

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a pipeline made. What was held out is not in here: it is for whoever serves the release to report."""

    folder: Path
    manifest: Manifest
    guarantee: Guarantee
    facts: package.Facts
    dropped: Mapping[str, int]
    """Samples of the field that were left out, by reason."""
    seconds: float

    @property
    def release(self) -> Path:
        """The folder of the release."""
        return self.folder / RELEASE

    @property
    def teacher(self) -> Path:
        """The teacher's file."""
        return self.folder / TEACHER


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What both pipelines are asked for."""

    folder: Path
    counter: int
    seed: int
    epsilon: float
    delta: float
    report: Report
    digits: Digits
    started: float = field(default_factory=time.monotonic)


def first_release(
    folder: Path, *, seed: int, epsilon: float = 0.02, delta: float = 0.05, report: Report = print
) -> Outcome:
    """Train a teacher and a first, little-taught student, and write release 1 into `folder`.

    `report` gets a line a step. Raises `InvalidInput` where `epsilon` and `delta` cannot be had, and `HedgerowError`
    saying which step failed and why.
    """
    job = _job(folder, 1, seed, epsilon, delta, report)
    splits = _splits(job.digits)
    report(f"data       {' · '.join(f'{size} {name}' for name, size in splits.items())} (seed {seed})")
    train_images, taught = job.digits.train.images, job.digits.train.first(data.FIRST_STUDENT)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, local_ray():
        targets = smoothed(job.digits.train.labels, LABEL_SMOOTHING)
        teacher = train(TEACHER_RECIPE, train_images, targets, Path(scratch, "teacher"), seed=seed)
        shutil.copyfile(teacher.onnx, folder / TEACHER)
        report(
            f"teacher    {quantize.parameters(teacher.onnx):,} parameters, {_size(teacher.onnx)}, "
            f"{_accuracy(job, _run(teacher.onnx, job.digits.calibration.images)):.1%} right on the calibration images"
        )
        lesson = Lesson(taught.images, _run(teacher.onnx, taught.images))
        student = train(STUDENT_RECIPE, lesson.images, lesson.targets, Path(scratch, "student"), seed=seed)
        return _finish(job, student, lesson, new=0, dropped={})


def next_release(
    folder: Path,
    *,
    base: Path,
    teacher: Path,
    samples: Iterable[Sample],
    counter: int,
    seed: int,
    epsilon: float = 0.02,
    delta: float = 0.05,
    report: Report = print,
) -> Outcome:
    """Train the student of the pipeline folder `base` on with the field's `samples`, and write release `counter`.

    The samples bring the answers of `teacher`, the file that the new guarantee binds; it is asked again, and what it
    does not stand by is left out. `seed` must be that of `base`: it says which images are for calibration. Raises
    `HedgerowError` as `first_release` does, and where there is nothing new to learn or a calibration image has been
    learned from.
    """
    job = _job(folder, counter, seed, epsilon, delta, report)
    before = Lesson.load(base / LESSON)
    known, calibration = data.fingerprints(before.images), data.fingerprints(job.digits.calibration.images)
    if known & calibration:
        raise HedgerowError("calibration images are among those learned from: the split's seed is not that of the base")
    reserved = calibration | data.fingerprints(job.digits.held_out.images)
    from_field = from_samples(samples, reserved, known)
    if len(from_field.lesson):
        from_field = confirmed(from_field, _run(teacher, from_field.lesson.images))
    left_out = "".join(f" · {count} {reason}" for reason, count in sorted(from_field.dropped.items()))
    report(f"field      {len(from_field.lesson)} new images with the teacher's answers{left_out}")
    if not len(from_field.lesson):
        raise HedgerowError("the samples of the field hold nothing new to learn from")
    lesson = before + from_field.lesson
    shutil.copyfile(teacher, folder / TEACHER)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, local_ray():
        student = train(
            STUDENT_RECIPE,
            lesson.images,
            lesson.targets,
            Path(scratch, "student"),
            seed=seed + counter,
            start=base / WEIGHTS,
        )
        return _finish(job, student, lesson, new=len(from_field.lesson), dropped=from_field.dropped)


def _job(folder: Path, counter: int, seed: int, epsilon: float, delta: float, report: Report) -> _Job:
    check_level(data.CALIBRATION, epsilon, delta)
    folder.mkdir(parents=True, exist_ok=True)
    return _Job(
        folder=folder,
        counter=counter,
        seed=seed,
        epsilon=epsilon,
        delta=delta,
        report=report,
        digits=data.load(seed),
    )


def _finish(job: _Job, student: Trained, lesson: Lesson, *, new: int, dropped: Mapping[str, int]) -> Outcome:
    """From the trained student to the release."""
    calibration = job.digits.calibration.images
    teacher, int8 = job.folder / TEACHER, student.onnx.with_name(package.STUDENT)
    quantize.quantize(student.onnx, int8, lesson.images)
    float_logits, logits, teacher_logits = (_run(path, calibration) for path in (student.onnx, int8, teacher))
    agreement = quantize.check(float_logits, logits)
    parameters = quantize.parameters(student.onnx)
    job.report(
        f"student    {parameters:,} parameters, {_size(student.onnx)}, {_accuracy(job, float_logits):.1%} right, "
        f"taught by the teacher on {len(lesson)} images"
    )
    job.report(f"int8       {_size(int8)}, {_accuracy(job, logits):.1%} right, {agreement:.1%} of answers unchanged")
    guarantee = certify(
        sample(logits, teacher_logits, RISKS["disagreement"]),
        Provenance(
            calibration_sha256=data.digest(calibration),
            student_sha256=release.describe(int8.parent, int8.name).sha256,
            teacher_sha256=release.describe(job.folder, TEACHER).sha256,
            engine=ENGINE,
            precision=quantize.PRECISION,
        ),
        epsilon=job.epsilon,
        delta=job.delta,
    )
    job.report(
        f"gate       {guarantee.score_name} ≥ {guarantee.gate.threshold:.4f}: "
        f"{1 - guarantee.escalated:.1%} of the calibration answers stay on the device, "
        f"{guarantee.errors:g} of {guarantee.samples} unlike the teacher's"
    )
    job.report(f"guarantee  {guarantee}")
    facts = package.Facts(
        seed=job.seed,
        splits=_splits(job.digits),
        teacher_parameters=quantize.parameters(teacher),
        teacher_bytes=teacher.stat().st_size,
        teacher_accuracy=_accuracy(job, teacher_logits),
        student_parameters=parameters,
        student_bytes=int8.stat().st_size,
        student_accuracy=_accuracy(job, logits),
        agreement=agreement,
        learned_from=len(lesson),
        field=new,
    )
    probes = job.digits.train.images[:PROBE_COUNT]
    manifest = package.write(
        job.folder / RELEASE,
        int8,
        model=MODEL,
        counter=job.counter,
        guarantee=guarantee,
        probes={f"in.{INPUT}": probes, f"out.{OUTPUT}": _run(int8, probes)},
        atol=PROBE_STEPS * quantize.output_step(int8, OUTPUT),
        facts=facts,
        labels=tuple(str(label) for label in range(data.CLASSES)),
    )
    shutil.copyfile(student.weights, job.folder / WEIGHTS)
    lesson.save(job.folder / LESSON)
    seconds = time.monotonic() - job.started
    job.report(
        f"release    {manifest.name}: {len(manifest.files)} files, {manifest.bytes / 1024:,.0f} KiB, in {seconds:.0f} s"
    )
    return Outcome(
        folder=job.folder, manifest=manifest, guarantee=guarantee, facts=facts, dropped=dropped, seconds=seconds
    )


def _run(model: Path, images: Images) -> NDArray[np.float32]:
    """The logits of the model at `model`, by the engine that devices use."""
    session = engines.load(ENGINE).open_model(model, threads=ENGINE_THREADS, streams=1)
    try:
        logits: NDArray[np.float32] = session.run({INPUT: images}, [OUTPUT])[OUTPUT]
    finally:
        session.close()
    return logits


def _accuracy(job: _Job, logits: NDArray[np.float32]) -> float:
    return float((logits.argmax(axis=1) == job.digits.calibration.labels).mean())


def _splits(digits: Digits) -> dict[str, int]:
    return {
        "train": len(digits.train),
        "calibration": len(digits.calibration),
        "field": len(digits.field),
        "held out": len(digits.held_out),
    }


def _size(file: Path) -> str:
    return f"{file.stat().st_size / 1024:,.0f} KiB"
