"""Whether two models promise the same, and whether two answers say the same. Pure: no IO, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import ConfigError
from hedgerow.tensors import InferResponse, ModelMetadata, Tensor, TensorSpec


@dataclass(frozen=True, slots=True)
class Comparison:
    """What comparing two answers gave. `furthest`: the largest absolute difference; infinite for what has none."""

    agreed: bool
    furthest: float


class Compare(Protocol):
    """How an answer is held against another one to the same request."""

    def __call__(self, current: InferResponse, candidate: InferResponse) -> Comparison:
        """Whether they agree. It must be safe to call on any thread."""
        ...


@dataclass(frozen=True, slots=True)
class ByValue:
    """Answers agree where no number is further apart than `tolerance`, and everything else is equal."""

    tolerance: float = 0.0
    classes: bool = False
    """Whether two or more floating numbers in a row are scores of classes, which agree where the same one is best."""

    def __call__(self, current: InferResponse, candidate: InferResponse) -> Comparison:
        """See `Compare`. A NaN is like another NaN and unlike any number."""
        others = {one.name: one for one in candidate.outputs}
        agreed, furthest = True, 0.0
        for one in current.outputs:
            other = others.get(one.name)
            if other is None or other.datatype != one.datatype or other.shape != one.shape:
                return Comparison(agreed=False, furthest=np.inf)
            if one.datatype in {"BOOL", "BYTES"}:
                agreed &= np.array_equal(one.array, other.array)
                continue
            a, b = _numbers(one), _numbers(other)
            apart = float(_apart(a, b).max(initial=0.0))
            furthest = max(furthest, apart)
            if self.classes and a.dtype.kind == "f" and a.ndim and a.shape[-1] > 1:
                agreed &= np.array_equal(a.argmax(axis=-1), b.argmax(axis=-1))
            else:
                agreed &= apart <= self.tolerance
        return Comparison(agreed, furthest)


def difference(one: ModelMetadata, other: ModelMetadata) -> str:
    """The first thing in which the interfaces of two models differ, in words; empty if they agree. Order is nothing."""
    return _first_difference("input", one.inputs, other.inputs) or _first_difference(
        "output", one.outputs, other.outputs
    )


def settle(
    known: Mapping[str, ModelMetadata], agreed: ModelMetadata | None
) -> tuple[ModelMetadata | None, dict[str, str]]:
    """The interface of all in `known`, and why those that differ must not be asked, by name.

    While some keep to what was `agreed` before, that holds; when none does, or before, all have to agree. Raises
    `ConfigError` if they do not.
    """
    if agreed is not None:
        odd = {name: text for name, metadata in known.items() if (text := difference(agreed, metadata))}
        if not known or len(odd) < len(known):
            return agreed, odd
    first = next(iter(known), None)
    if first is None:
        return None, {}
    for name, metadata in known.items():
        if text := difference(known[first], metadata):
            raise ConfigError(f"{first} and {name} are not interchangeable: {text}")
    return known[first], {}


def _first_difference(kind: str, ones: Sequence[TensorSpec], others: Sequence[TensorSpec]) -> str:
    left, right = ({spec.name: spec for spec in specs} for specs in (ones, others))
    for name in [*left, *(name for name in right if name not in left)]:
        if left.get(name) != right.get(name):
            return f"{kind} {name!r} is {_in_words(left.get(name))} here and {_in_words(right.get(name))} there"
    return ""


def _in_words(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.datatype} {list(spec.shape)}"


def _numbers(tensor: Tensor) -> NDArray[Any]:
    if tensor.datatype == "BF16":
        return (tensor.array.astype(np.uint32) << 16).view(np.float32)
    return tensor.array


def _apart(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Absolute differences; of whole numbers at least 1 where they differ, however large they are."""
    same = a == b
    if a.dtype.kind == "f":
        same |= np.isnan(a) & np.isnan(b)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    if a.dtype.kind != "f":
        apart = np.maximum(apart, 1.0)
    return np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))
