"""How far the most likely class is ahead of the second."""

import numpy as np
from numpy.typing import NDArray

from hedgerow.scores import Reading

CLASSES = True


def score(reading: Reading) -> NDArray[np.float64]:
    """See the module."""
    two = np.partition(reading.class_probabilities, -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])
