"""What may go wrong when the small model answers in place of the large one: losses in [0, 1]. Pure.

A risk that is not here is losses that the caller works out, one for each sample: 1 - IoU, 1 - F1, an absolute error
that is capped and scaled.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import InvalidInput

Outputs = NDArray[np.floating[Any]]
"""Logits or probabilities, shape (n, classes)."""
Labels = NDArray[np.integer[Any]]
"""The right classes, shape (n,)."""


Loss = Callable[[Outputs, Outputs, Labels | None], NDArray[np.float64]]
"""``(edge, cloud, labels)``: how much is lost on each sample, shape (n,), in [0, 1]; raises `InvalidInput` if something
is missing."""


@dataclass(frozen=True, slots=True)
class Risk:
    """A kind of risk: what it is called in a guarantee, its loss, and whether it is of those that pass only."""

    title: str
    loss: Loss
    selective: bool = False


def disagreement(edge: Outputs, cloud: Outputs, _: Labels | None = None) -> NDArray[np.float64]:
    """1 where the two name different classes, or where the small one says nothing finite."""
    differ = (edge.argmax(axis=1) != cloud.argmax(axis=1)) | ~np.isfinite(edge).all(axis=1)
    return np.asarray(differ, np.float64)


def accuracy_lost(edge: Outputs, cloud: Outputs, labels: Labels | None) -> NDArray[np.float64]:
    """1 where the small one is wrong and the large one would have been right.

    Where the small one is right and the large one wrong, nothing is won: what is promised is an upper bound.
    """
    if labels is None:
        raise InvalidInput("accuracy is measured against labels, and there are none")
    right = edge.argmax(axis=1) == labels
    lost = (cloud.argmax(axis=1) == labels) & (~right | ~np.isfinite(edge).all(axis=1))
    return np.asarray(lost, np.float64)


RISKS: Final[Mapping[str, Risk]] = {
    "disagreement": Risk("disagreement with the teacher", disagreement),
    "accuracy": Risk("accuracy lost against the teacher", accuracy_lost),
    "selective": Risk("disagreement among the answers given", disagreement, selective=True),
    "selective-accuracy": Risk("accuracy lost among the answers given", accuracy_lost, selective=True),
}
