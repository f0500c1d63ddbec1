"""What a student learns from: images with the teacher's logits, from the training split and from the field."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from hedgerow.errors import HedgerowError
from hedgerow.oip.messages import request_from_proto, response_from_proto
from hedgerow.proto import oip_pb2
from hedgerow.proto.link_pb2 import Sample
from hedgerow_cloud.learn.data import CLASSES, PIXELS, Images, fingerprints
from hedgerow_cloud.learn.train import INPUT, OUTPUT, Targets

MAX_SAMPLES: Final = 100_000
"""How many samples of the field one release learns from; the rest is left out."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """Images, shape (n, 64), with the teacher's logits on them, shape (n, 10)."""

    images: Images
    logits: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> Targets:
        """The teacher's class probabilities (Hinton et al. 2015, at temperature 1)."""
        exponentials = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        targets: Targets = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
        return targets

    def __add__(self, other: "Lesson") -> "Lesson":
        return Lesson(np.concatenate([self.images, other.images]), np.concatenate([self.logits, other.logits]))

    def save(self, path: Path) -> None:
        """Write both arrays to the .npz at `path`."""
        np.savez(path, images=self.images, logits=self.logits)

    @classmethod
    def load(cls, path: Path) -> "Lesson":
        """What `save` wrote; raises `HedgerowError` if it is not there or something else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(arrays["images"], arrays["logits"])
        except (OSError, ValueError, KeyError) as error:
            raise HedgerowError(
                f"{path.name} is missing or does not hold a lesson: train from a whole release"
            ) from error


@dataclass(frozen=True, slots=True)
class Field:
    """What the samples of the field came to; `dropped` counts those that were left out, by reason."""

    lesson: Lesson
    dropped: Mapping[str, int]


def from_samples(samples: Iterable[Sample], reserved: frozenset[bytes], known: frozenset[bytes]) -> Field:
    """The lesson in `samples`, each image once, in their order.

    Samples come from devices and are taken on trust in nothing: malformed ones are dropped, and so are images whose
    fingerprint is `reserved` (calibration and held-out data must stay unseen) or `known` already.
    """
    images: list[NDArray[Any]] = []
    logits: list[NDArray[Any]] = []
    taken = set(known)
    dropped: Counter[str] = Counter()
    for count, sample in enumerate(samples):
        if count >= MAX_SAMPLES:
            dropped["beyond the limit"] += 1
            continue
        try:
            shown, answer = _pair(sample)
        except (HedgerowError, DecodeError, KeyError):
            dropped["malformed"] += 1
            continue
        for image, row in zip(shown, answer, strict=True):
            (fingerprint,) = fingerprints(image[None])
            if fingerprint in reserved:
                dropped["reserved"] += 1
            elif fingerprint in taken:
                dropped["known"] += 1
            else:
                taken.add(fingerprint)
                images.append(image)
                logits.append(row)
    lesson = Lesson(np.array(images, np.float32).reshape(-1, PIXELS), np.array(logits, np.float32).reshape(-1, CLASSES))
    return Field(lesson, dropped)


def confirmed(field: Field, logits: NDArray[np.float32]) -> Field:
    """`field` as the teacher itself sees it: its `logits` on those images, without the images it is misquoted on.

    The samples' answers came through devices, and perhaps from another teacher.
    """
    agree = field.lesson.logits.argmax(axis=1) == logits.argmax(axis=1)
    disputed = int((~agree).sum())
    dropped = {**field.dropped, **({"disputed": disputed} if disputed else {})}
    return Field(Lesson(field.lesson.images[agree], logits[agree]), dropped)


def smoothed(labels: NDArray[np.int64], smoothing: float) -> Targets:
    """Class probabilities for true labels, with `smoothing` spread over all classes (Szegedy et al. 2016)."""
    targets = np.full((len(labels), CLASSES), smoothing / CLASSES, np.float32)
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return targets


def _pair(sample: Sample) -> tuple[NDArray[Any], NDArray[Any]]:
    request = request_from_proto(oip_pb2.ModelInferRequest.FromString(sample.request))
    response = response_from_proto(oip_pb2.ModelInferResponse.FromString(sample.cloud_response))
    images, logits = request.input(INPUT), response.output(OUTPUT)
    fits = images.ndim == logits.ndim == 2 and images.shape[1:] == (PIXELS,) and logits.shape[1:] == (CLASSES,)
    if not fits or len(images) != len(logits) or images.dtype != np.float32 or logits.dtype != np.float32:
        raise HedgerowError("not an image with the teacher's logits")
    if not (np.isfinite(images).all() and np.isfinite(logits).all()):
        raise HedgerowError("not finite")
    return images, logits
