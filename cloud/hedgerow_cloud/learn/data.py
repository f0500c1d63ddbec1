"""scikit-learn's handwritten digits, split for good by a seed.

1,797 real scans of 8x8 pixels (UCI's optical recognition test set), no two alike. Each goes to exactly one split:

- ``train``: the teacher sees all of it, the first student only the first `FIRST_STUDENT` of it;
- ``calibration``: certifies gates; never trained on, by no model;
- ``field``: traffic of devices in use, whose escalations later students may learn from;
- ``held_out``: only ever reported.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

TRAIN: Final = 500
FIRST_STUDENT: Final = 100
"""So few that the first student has something to learn in the field."""
CALIBRATION: Final = 450
FIELD: Final = 500
CLASSES: Final = 10
PIXELS: Final = 64
_BRIGHTEST: Final = 16

Images = NDArray[np.float32]
"""Shape (n, 64), row by row from the top, 0 (paper) to 1 (ink)."""


@dataclass(frozen=True, slots=True)
class Split:
    """Images with what they show, shapes (n, 64) and (n,)."""

    images: Images
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Split":
        """The first `count` of them."""
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """The four splits of one seed, pairwise disjoint."""

    train: Split
    calibration: Split
    field: Split
    held_out: Split


def load(seed: int) -> Digits:
    """The digits as `seed` splits them: the same seed always gives the same splits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    everything = Split((pixels[order] / _BRIGHTEST).astype(np.float32), labels[order].astype(np.int64))
    cuts = np.cumsum([0, TRAIN, CALIBRATION, FIELD])
    train, calibration, field, held_out = (
        Split(everything.images[start:end], everything.labels[start:end])
        for start, end in zip(cuts, [*cuts[1:], None], strict=True)
    )
    return Digits(train=train, calibration=calibration, field=field, held_out=held_out)


def digest(*arrays: NDArray[Any]) -> str:
    """Hex SHA-256 over dtypes, shapes and contents of `arrays`."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(f"{array.dtype.str}{array.shape}".encode())
        whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def fingerprints(images: Images) -> frozenset[bytes]:
    """SHA-256 of each image, to tell whether two sets have any in common."""
    return frozenset(hashlib.sha256(np.ascontiguousarray(image, "<f4").tobytes()).digest() for image in images)
