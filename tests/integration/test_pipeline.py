"""The learning pipeline, for real and short: Ray Train, ONNX, int8, a guarantee, two releases."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from hedgerow import engines, release
from hedgerow.errors import HedgerowError, InvalidInput
from hedgerow.oip.messages import request_to_proto, response_to_proto
from hedgerow.proto.link_pb2 import Sample
from hedgerow.tensors import InferRequest, InferResponse, tensor
from hedgerow_cloud.certify.bounds import upper_binomial
from hedgerow_cloud.cluster import local_ray
from hedgerow_cloud.learn import data, pipeline
from hedgerow_cloud.learn.distill import Lesson
from hedgerow_cloud.learn.pipeline import Outcome
from hedgerow_cloud.learn.train import train

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(180)]

SEED = 3
EPSILON, DELTA = 0.05, 0.05
STUDENT = "student.int8.onnx"


def run(model: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    session = engines.load("onnxruntime").open_model(model, streams=1, threads=1)
    logits: NDArray[np.float32] = session.run({"image": images}, ["logits"])["logits"]
    return logits


def sample(images: NDArray[np.float32], logits: NDArray[np.float32]) -> Sample:
    request = InferRequest(model="digits", inputs=(tensor("image", images),))
    answer = InferResponse(model="digits", version="1", outputs=(tensor("logits", logits),))
    return Sample(
        request=request_to_proto(request).SerializeToString(),
        cloud_response=response_to_proto(answer).SerializeToString(),
    )


@dataclass(frozen=True)
class Story:
    first: Outcome
    second: Outcome
    lines: list[str]
    escalated: int


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("learn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "TEACHER_RECIPE", replace(pipeline.TEACHER_RECIPE, epochs=12))
        patch.setattr(pipeline, "STUDENT_RECIPE", replace(pipeline.STUDENT_RECIPE, epochs=30))
        lines: list[str] = []
        first = pipeline.first_release(folder / "1", seed=SEED, epsilon=EPSILON, delta=DELTA, report=lines.append)
        digits = data.load(SEED)
        traffic = digits.field.images
        scores = first.guarantee.gate.scores(run(first.release / STUDENT, traffic))
        escalated = traffic[scores < first.guarantee.gate.threshold]
        answers = run(first.teacher, escalated)
        samples = [sample(image[None], answer[None]) for image, answer in zip(escalated, answers, strict=True)]
        # What must not be learned from, and what cannot be.
        (unsent, *_) = traffic[scores >= first.guarantee.gate.threshold]
        reserved = np.concatenate([digits.calibration.images[:3], digits.held_out.images[:2]])
        hostile = [
            sample(reserved, run(first.teacher, reserved)),
            samples[0],
            sample(unsent[None], -run(first.teacher, unsent[None])),
            Sample(request=b"\xff\xff", cloud_response=b""),
            sample(escalated[:1, :63], answers[:1]),
            sample(escalated[:1], np.full((1, 10), np.nan, np.float32)),
        ]
        second = pipeline.next_release(
            folder / "2",
            base=first.folder,
            teacher=first.teacher,
            samples=iter(samples + hostile),
            counter=2,
            seed=SEED,
            epsilon=EPSILON,
            delta=DELTA,
            report=lines.append,
        )
        yield Story(first, second, lines, len(escalated))


@pytest.fixture(params=["first", "second"])
def outcome(story: Story, request: pytest.FixtureRequest) -> Outcome:
    chosen: Outcome = getattr(story, request.param)
    return chosen


def test_the_guarantee_binds_the_files_that_ship_and_can_be_recomputed_from_them(outcome: Outcome) -> None:
    manifest = release.read(outcome.release)
    assert manifest == outcome.manifest
    (variant,) = manifest.variants
    guarantee = variant.guarantee
    assert guarantee == outcome.guarantee
    assert guarantee is not None
    assert guarantee.student_sha256 == hashlib.sha256((outcome.release / STUDENT).read_bytes()).hexdigest()
    assert guarantee.teacher_sha256 == hashlib.sha256(outcome.teacher.read_bytes()).hexdigest()
    calibration = data.load(SEED).calibration
    assert guarantee.calibration_sha256 == data.digest(calibration.images)
    logits, truth = run(outcome.release / STUDENT, calibration.images), run(outcome.teacher, calibration.images)
    passed = guarantee.gate.scores(logits) >= guarantee.gate.threshold
    assert guarantee.samples == len(calibration)
    assert guarantee.errors == int((passed & (logits.argmax(1) != truth.argmax(1))).sum())
    assert guarantee.escalated == pytest.approx(1 - passed.mean())
    assert upper_binomial(int(guarantee.errors), guarantee.samples, DELTA) <= EPSILON
    assert 0.2 < passed.mean() <= 1


def test_nothing_was_trained_on_what_certifies_or_is_reported(story: Story) -> None:
    digits = data.load(SEED)
    splits = [
        data.fingerprints(split.images) for split in (digits.train, digits.calibration, digits.field, digits.held_out)
    ]
    assert len(frozenset[bytes]().union(*splits)) == sum(len(split) for split in splits) == 1797
    train_prints, calibration, field, held_out = splits
    learned = data.fingerprints(Lesson.load(story.second.folder / "lesson.npz").images)
    assert len(learned) == story.second.facts.learned_from == data.FIRST_STUDENT + story.escalated
    assert learned <= train_prints | field
    assert not learned & (calibration | held_out)


def test_samples_that_must_not_or_cannot_teach_are_dropped_and_counted(story: Story) -> None:
    assert story.second.dropped == {"reserved": 5, "known": 1, "malformed": 3, "disputed": 1}
    assert story.second.facts.field == story.escalated
    assert any("5 reserved" in line for line in story.lines)


def test_what_ships_is_really_int8(outcome: Outcome) -> None:
    graph = onnx.load(str(outcome.release / STUDENT)).graph
    kinds = [node.op_type for node in graph.node]
    assert {"QuantizeLinear", "DequantizeLinear", "Gemm"} <= set(kinds)
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    assert len(weights) == 3
    for weight in weights:
        values = onnx.numpy_helper.to_array(weight)
        assert values.dtype == np.int8
        assert np.abs(values.astype(int)).max() <= 64  # 7 bits, for CPUs without VNNI
    # One scale a channel: as many scales as the widest layer has outputs.
    assert any(tensor.dims == [384] and "scale" in tensor.name for tensor in graph.initializer)
    assert outcome.manifest.bytes < 0.1 * outcome.teacher.stat().st_size


def test_the_probes_are_reproduced_and_another_model_does_not_reproduce_them(story: Story) -> None:
    for outcome, other in ((story.first, story.second), (story.second, story.first)):
        probes = outcome.manifest.probes
        assert probes is not None
        with np.load(outcome.release / probes.file) as arrays:
            given, expected = arrays["in.image"], arrays["out.logits"]
        one_by_one = np.concatenate([run(outcome.release / STUDENT, image[None]) for image in given])
        assert np.allclose(one_by_one, expected, probes.rtol, probes.atol)
        assert not np.allclose(run(other.release / STUDENT, given), expected, probes.rtol, probes.atol)


def test_the_next_student_is_better_and_the_teacher_is_the_same(story: Story) -> None:
    assert story.second.manifest.name == "digits/2"
    assert story.second.guarantee.teacher_sha256 == story.first.guarantee.teacher_sha256
    assert story.second.facts.student_accuracy > story.first.facts.student_accuracy
    assert story.second.guarantee.escalated < story.first.guarantee.escalated


def test_the_card_says_what_was_measured_and_no_traces_of_the_machine_ship(outcome: Outcome) -> None:
    card = (outcome.release / "MODEL_CARD.md").read_text(encoding="utf-8")
    for word in (
        outcome.guarantee.student_sha256,
        f"{outcome.guarantee.gate.threshold:.4f}",
        "Limits of the guarantee",
    ):
        assert word in card
    for file in (outcome.release / STUDENT, outcome.teacher):
        assert b"site-packages" not in file.read_bytes()
        assert str(Path(pipeline.__file__).parent).encode() not in file.read_bytes()


def test_another_seed_would_calibrate_on_what_was_learned_and_is_refused(story: Story, tmp_path: Path) -> None:
    before = Lesson.load(story.first.folder / "lesson.npz")
    assert data.fingerprints(data.load(SEED + 1).calibration.images) & data.fingerprints(before.images)
    with pytest.raises(HedgerowError, match="calibration images are among those learned from"):
        pipeline.next_release(
            tmp_path,
            base=story.first.folder,
            teacher=story.first.teacher,
            samples=[],
            counter=2,
            seed=SEED + 1,
            report=lambda _: None,
        )


def test_failures_say_what_is_wrong_before_any_training(story: Story, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"450 calibration samples cannot certify ε = 0.001 .* at least 2995"):
        pipeline.first_release(tmp_path, seed=SEED, epsilon=0.001)
    with pytest.raises(HedgerowError, match="nothing new to learn"):
        pipeline.next_release(
            tmp_path, base=story.first.folder, teacher=story.first.teacher, samples=[], counter=2, seed=SEED
        )
    with pytest.raises(HedgerowError, match=r"lesson\.npz is missing"):
        pipeline.next_release(tmp_path, base=tmp_path, teacher=story.first.teacher, samples=[], counter=2, seed=SEED)


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    bad = replace(pipeline.STUDENT_RECIPE, learning_rate=-1.0, epochs=1)
    images = np.zeros((8, 64), np.float32)
    with (
        local_ray(),
        pytest.raises(HedgerowError, match="training the student failed: ValueError: Invalid learning rate"),
    ):
        train(bad, images, np.full((8, 10), 0.1, np.float32), tmp_path, seed=0)
