"""How narrow the predicted interval is: shape (n, quantiles) or (n, values, quantiles), quantiles ascending.

One over one plus the distance of the outermost quantiles in units of `scale`, for the widest value. Quantiles that
cross say nothing, and are not sure at all.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hedgerow.scores import Reading

SCALE: Final = "scale"
OPTIONS: Mapping[str, float] = {SCALE: 1.0}


def score(reading: Reading) -> NDArray[np.float64]:
    """See the module."""
    values = reading.values
    if values.ndim < 2 or values.shape[-1] < 2:
        return np.zeros(len(values))
    rows = values.reshape(len(values), -1, values.shape[-1])
    width = (rows[..., -1] - rows[..., 0]).max(axis=1)
    crossed = (np.diff(rows, axis=-1) < 0).any(axis=(1, 2))
    return np.where(crossed, 0.0, 1 / (1 + np.maximum(width, 0.0) / reading.options[SCALE]))
