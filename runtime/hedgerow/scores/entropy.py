"""One minus the entropy as a share of the largest possible: 0 where all classes are equal, 1 where one is certain."""

import numpy as np
from numpy.typing import NDArray

from hedgerow.scores import Reading

CLASSES = True


def score(reading: Reading) -> NDArray[np.float64]:
    """See the module."""
    probabilities = reading.class_probabilities
    logs = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return np.asarray(1 + (probabilities * logs).sum(axis=1) / np.log(probabilities.shape[1]))
