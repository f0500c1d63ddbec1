"""The probability of the most likely class (Hendrycks and Gimpel 2017)."""

import numpy as np
from numpy.typing import NDArray

from hedgerow.scores import Reading

CLASSES = True


def score(reading: Reading) -> NDArray[np.float64]:
    """See the module."""
    return np.asarray(np.maximum.reduce(reading.class_probabilities, axis=1))
