"""Tensors, requests and answers, and their form on the wire (Open Inference Protocol v2).

Inside Hedgerow a request is the plain objects of this module; the protocol's messages are taken apart and put together
here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Parameter = bool | int | float | str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes or gives: OIP `datatype` ("FP32", "BYTES", ...) and shape, -1 for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model's interface. `properties` travel to clients as they are (OIP `properties`)."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array. BYTES arrays have dtype object and hold `bytes`; BF16 arrays hold their bits as uint16."""

    name: str
    datatype: str
    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """One request. An empty `version` leaves the choice to the backend; empty `outputs` means all of them."""

    model: str
    inputs: tuple[Tensor, ...]
    version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def input(self, name: str) -> NDArray[Any]:
        """The array of the input called `name`; KeyError if there is none."""
        return _named(self.inputs, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResponse:
    """One answer, of the version that gave it. `parameters` explain it: see `hedgerow.router`."""

    model: str
    version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def output(self, name: str) -> NDArray[Any]:
        """The array of the output called `name`; KeyError if there is none."""
        return _named(self.outputs, name)


def _named(tensors: tuple[Tensor, ...], name: str) -> NDArray[Any]:
    for tensor in tensors:
        if tensor.name == name:
            return tensor.array
    raise KeyError(name)
