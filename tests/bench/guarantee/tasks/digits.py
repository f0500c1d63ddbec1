"""scikit-learn's digits: the pipeline's own teacher and int8 student, on images that neither has learned from.

1,297 real scans are too few for a truth of half a percent, so each is seen many times: moved by up to half a pixel,
turned by up to 15 degrees, and with noise, as a scanner would.
"""

import tempfile
from pathlib import Path

import numpy as np
from bench.guarantee.pools import Pool
from numpy.typing import NDArray
from scipy.ndimage import rotate, shift

from hedgerow_cloud.learn import data
from hedgerow_cloud.learn.pipeline import RELEASE, TEACHER, _run, first_release

SEED, VIEWS = 0, 30
SHIFT_PIXELS, TURN_DEGREES, NOISE = 0.5, 15.0, 0.05


def make(_: Path) -> Pool:
    """See the module."""
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as scratch:
        outcome = first_release(Path(scratch), seed=SEED, report=lambda _: None)
        student = Path(scratch, RELEASE, outcome.manifest.variants[0].file)
        digits = data.load(SEED)
        unseen = np.concatenate([split.images for split in (digits.calibration, digits.field, digits.held_out)])
        views = np.concatenate([_seen_again(unseen, rng) for _ in range(VIEWS)])
        edge, cloud = _run(student, views), _run(Path(scratch, TEACHER), views)
    return Pool(edge, cloud, f"{len(views):,} views of {len(unseen):,} scans that neither model has learned from")


def _seen_again(images: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    seen = np.empty_like(images)
    for number, image in enumerate(images):
        turned = rotate(image.reshape(8, 8), rng.uniform(-TURN_DEGREES, TURN_DEGREES), reshape=False, order=1)
        moved = shift(turned, rng.uniform(-SHIFT_PIXELS, SHIFT_PIXELS, 2), order=1)
        seen[number] = moved.ravel()
    return np.clip(seen + rng.normal(0, NOISE, seen.shape), 0, 1).astype(np.float32)
