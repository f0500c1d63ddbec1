"""The free energy of the logits, their log-sum-exp (Liu et al. 2020), brought into [0, 1] without changing the order.

Unlike probabilities it sees how large the logits are, not only how they differ: what looks like nothing that the model
knows has small ones.
"""

import numpy as np
from numpy.typing import NDArray

from hedgerow.scores import Reading

CLASSES = True


def score(reading: Reading) -> NDArray[np.float64]:
    """See the module. Of probabilities, which have no size, it says nothing."""
    logits = reading.logits
    largest = np.maximum.reduce(logits, axis=1)
    energy = largest + np.log(np.add.reduce(np.exp(logits - largest[:, None]), axis=1))
    return np.asarray(0.5 + 0.5 * energy / (1 + np.abs(energy)))
