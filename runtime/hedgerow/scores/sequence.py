"""How likely a sequence is by its mean token: shape (n, tokens), log-probabilities of the tokens that were chosen.

The geometric mean of the tokens' probabilities, so that long sequences are not less sure than short ones. Places behind
the end hold a number above 0, which no log-probability is.
"""

import numpy as np
from numpy.typing import NDArray

from hedgerow.scores import Reading


def score(reading: Reading) -> NDArray[np.float64]:
    """See the module. A sequence without tokens scores 0."""
    rows = reading.values.reshape(len(reading.values), -1)
    there = rows <= 0
    count = there.sum(axis=1)
    total = np.where(there, rows, 0.0).sum(axis=1)
    return np.where(count > 0, np.exp(total / np.maximum(count, 1)), 0.0)
