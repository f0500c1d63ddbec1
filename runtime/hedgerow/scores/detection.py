"""How sure a detector is of all that it says of a picture, and of all that it does not.

The output holds the confidence of each candidate, shape (n, candidates), or of each candidate and class, shape
(n, candidates, classes); what is not there is 0. A candidate at or above `reported` is a claim, as sure as it says.
That there is nothing else is a claim as well: the surest candidate that was left out says how much speaks against it. A
picture is as sure as the least sure of these claims, so that one without any detection is judged by what was nearly
reported, and does not slip through because there is nothing in it.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hedgerow.scores import Reading

REPORTED: Final = "reported"
OPTIONS: Mapping[str, float] = {REPORTED: 0.5}


def score(reading: Reading) -> NDArray[np.float64]:
    """See the module."""
    rows = reading.values.reshape(len(reading.values), -1)
    reported = rows >= reading.options[REPORTED]
    claims = np.where(reported, rows, 1.0).min(axis=1)
    left_out = np.where(reported, 0.0, rows).max(axis=1)
    return np.asarray(np.minimum(claims, 1 - left_out))
