"""How far the heads of an ensemble agree: shape (n, heads) or (n, heads, values).

One over one plus their standard deviation in units of `scale`, for the value on which they agree the least.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hedgerow.scores import Reading

SCALE: Final = "scale"
OPTIONS: Mapping[str, float] = {SCALE: 1.0}


def score(reading: Reading) -> NDArray[np.float64]:
    """See the module. A single head has nobody to agree with: 0."""
    values = reading.values
    if values.ndim < 2 or values.shape[1] < 2:
        return np.zeros(len(values))
    spread = values.std(axis=1).reshape(len(values), -1).max(axis=1)
    return np.asarray(1 / (1 + spread / reading.options[SCALE]))
