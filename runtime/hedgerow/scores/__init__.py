"""Scores: how sure a model is of its answer, from 0 to 1, more is surer. One module a score, found by its file name.

A score looks at one output of the model, in rows of which each is an answer of its own, and says a number for each. It
need not be a probability: a gate is certified on what it does, so all that counts is that wrong answers come out lower
than right ones. Invariants, held by property tests over every score found:

- a number in [0, 1] for each row, which does not depend on the other rows;
- no row at all is not sure: what the model did not find is a claim like any other.

A new score is a new file here with a function `score`, or, in a package of one's own, a function that is declared as an
entry point in the group ``hedgerow.scores``.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

GROUP: Final = "hedgerow.scores"
_TINY: Final = np.finfo(np.float64).tiny


class Reading(msgspec.Struct, frozen=True):
    """What a score looks at: `values` in rows, shape (n, ...), finite, in float64, and not empty.

    Of scores that say `CLASSES`, a row is the last dimension alone, (n, classes), whatever stands before it; of all
    others the first dimension counts the rows.
    """

    values: NDArray[np.float64]
    temperature: float = 1.0
    probabilities: bool = False
    """Whether the values are probabilities; else logits."""
    options: Mapping[str, float] = {}
    """What the score can be told, by name; all of its `OPTIONS` are there."""

    @property
    def logits(self) -> NDArray[np.float64]:
        """Shape (n, classes), divided by the temperature. The logarithms of probabilities are logits."""
        values = np.log(np.maximum(self.values, _TINY)) if self.probabilities else self.values
        return np.divide(values, self.temperature)

    @property
    def class_probabilities(self) -> NDArray[np.float64]:
        """Shape (n, classes), rows summing to 1: softmax of the logits."""
        # Ufuncs themselves: of a row or two, most of the time goes into numpy's wrappers around them.
        rows = self.logits
        rows -= np.maximum.reduce(rows, axis=1, keepdims=True)
        np.exp(rows, out=rows)
        rows /= np.add.reduce(rows, axis=1, keepdims=True)
        return rows


class Score(Protocol):
    """A score's function."""

    def __call__(self, reading: Reading) -> NDArray[np.float64]:
        """Shape (n,)."""
        ...


class Kind(msgspec.Struct, frozen=True):
    """A score as it was found: its function, whether it judges `classes`, and the `options` it knows, by default."""

    score: Score
    classes: bool
    options: Mapping[str, float]


@cache
def load(name: str) -> Kind:
    """The score called `name`; raises `LookupError` if there is none."""
    if name in _own():
        module = importlib.import_module(f"{__name__}.{name}")
        function: Any = module.score
        return Kind(function, getattr(module, "CLASSES", False), getattr(module, "OPTIONS", {}))
    found = _declared().get(name)
    if found is None:
        raise LookupError(f"there is no score {name!r}; there are: {', '.join(known())}")
    function = found.load()
    return Kind(function, getattr(function, "classes", False), getattr(function, "options", {}))


def known() -> tuple[str, ...]:
    """Names of all scores, those of other packages last."""
    return (*_own(), *(name for name in sorted(_declared()) if name not in _own()))


@cache
def _own() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@cache
def _declared() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
