"""Tensors, requests and answers: the plain objects that a request is inside Hedgerow.

Their form on the wire is `hedgerow.oip.messages`' business.
"""

from collections.abc import Hashable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from hedgerow.errors import HedgerowError, InvalidInput

Parameter = bool | int | float | str

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_DATATYPES = {dtype.str[1:]: datatype for datatype, dtype in DTYPES.items() if datatype not in {"BF16", "BYTES"}}


class TensorSpec(msgspec.Struct, frozen=True):
    """What a model takes or gives: OIP `datatype` ("FP32", "BYTES", ...) and shape, -1 for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct, frozen=True):
    """A model's interface. `properties` travel to clients as they are (OIP `properties`)."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str] = msgspec.field(default_factory=dict)


class Tensor(msgspec.Struct, frozen=True):
    """A named array. BYTES arrays have dtype object and hold `bytes`; BF16 arrays hold their bits as uint16."""

    name: str
    datatype: str
    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape


HOPS_KEY: Final = "hedgerow-hops"
"""In a call's metadata: how many routers it has passed."""
HOPS: Final[ContextVar[int]] = ContextVar("hops", default=0)
"""How many the call has passed that is being answered, for what a backend is asked without a request."""
TENANT_KEY: Final = "hedgerow-tenant"
"""In a call's metadata: who asks, where whoever stands before us vouches for it."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request comes from: what travels in a call's metadata, not in its message."""

    tenant: str = ""
    """Who asks, as far as it is known: for quotas."""
    hops: int = 0
    """Routers that it has passed."""
    traceparent: str = ""
    """The caller's span, as W3C Trace Context writes it."""
    tracestate: str = ""


class InferRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request. An empty `version` leaves the choice to the backend; empty `outputs` means all of them."""

    model: str
    inputs: tuple[Tensor, ...]
    version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = msgspec.field(default_factory=dict)
    origin: Origin = Origin()

    def input(self, name: str) -> NDArray[Any]:
        """The array of the input called `name`; KeyError if there is none."""
        return _named(self.inputs, name)


class Run:
    """What answers have in common that came out of one run of a model: all of its outputs, and notes on them.

    Whoever works something out for a whole run at once (`hedgerow.gate` does) leaves it in `notes`, under a key of its
    own, for the answers beside. It does not leave the process.
    """

    __slots__ = ("notes", "outputs")

    def __init__(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        self.outputs = outputs
        self.notes: dict[Hashable, Any] = {}

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class InferResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, of the version that gave it. `parameters` explain it: see `hedgerow.parameters`."""

    model: str
    version: str
    outputs: tuple[Tensor, ...]
    id: str = ""
    parameters: Mapping[str, Parameter] = msgspec.field(default_factory=dict)
    run: Run | None = None
    """Where it came out together with others; its own rows are those from `first` on."""
    first: int = 0
    source: ModelMetadata | None = None
    """The interface of the model that gave it, if that is one of this process."""

    def output(self, name: str) -> NDArray[Any]:
        """The array of the output called `name`; KeyError if there is none."""
        return _named(self.outputs, name)


def _named(tensors: tuple[Tensor, ...], name: str) -> NDArray[Any]:
    for tensor in tensors:
        if tensor.name == name:
            return tensor.array
    raise KeyError(name)


def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """The (little-endian) dtype of arrays of an OIP datatype; raises `InvalidInput` if there is no such datatype."""
    try:
        return DTYPES[datatype]
    except KeyError:
        raise InvalidInput(f"there is no datatype {datatype!r}; expected one of {', '.join(DTYPES)}") from None


def datatype_of(dtype: DTypeLike) -> str:
    """The OIP datatype of arrays of `dtype`; text, bytes and objects are BYTES. BF16 has no dtype of its own."""
    dtype = np.dtype(dtype)
    datatype = "BYTES" if dtype.kind in "OSU" else _DATATYPES.get(dtype.str[1:])
    if datatype is None:
        raise InvalidInput(f"arrays of {dtype} have no datatype in the protocol; expected one of {', '.join(DTYPES)}")
    return datatype


def tensor(name: str, value: ArrayLike, datatype: str = "") -> Tensor:
    """`value` as a tensor: its datatype is that of its dtype unless given; text becomes UTF-8 BYTES."""
    array = np.asarray(value)
    datatype = datatype or datatype_of(array.dtype)
    if datatype == "BYTES":
        elements = [item.encode() if isinstance(item, str) else item for item in array.ravel().tolist()]
        return Tensor(name, datatype, objects(elements, array.shape))
    return Tensor(name, datatype, array)


def check_request(request: InferRequest, metadata: ModelMetadata) -> None:
    """Raise `InvalidInput` unless `request` has the inputs that the model takes and asks for outputs that it gives."""
    # The usual request: every input in the model's own order, and all outputs.
    if (
        not request.outputs
        and len(request.inputs) == len(metadata.inputs)
        and all(
            one.name == spec.name and one.datatype == spec.datatype and _fits(one.array.shape, spec.shape)
            for one, spec in zip(request.inputs, metadata.inputs, strict=True)
        )
    ):
        return
    specs = {spec.name: spec for spec in metadata.inputs}
    check_distinct("input", [given.name for given in request.inputs])
    given = {one.name: one for one in request.inputs}
    for name in specs:
        if name not in given:
            raise InvalidInput(f"input {name!r} is missing: model {metadata.name} expects {_list(metadata.inputs)}")
    for name, one in given.items():
        spec = specs.get(name)
        if spec is None:
            raise InvalidInput(f"there is no input {name!r}: model {metadata.name} expects {_list(metadata.inputs)}")
        if one.datatype != spec.datatype or not _fits(one.shape, spec.shape):
            raise InvalidInput(
                f"input {name!r}: expected {_type(spec.datatype, spec.shape)}, got {_type(one.datatype, one.shape)}"
            )
    known = {spec.name for spec in metadata.outputs}
    check_distinct("output", request.outputs)
    for name in request.outputs:
        if name not in known:
            raise InvalidInput(f"there is no output {name!r}: model {metadata.name} gives {_list(metadata.outputs)}")


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return shape == wanted or (
        len(shape) == len(wanted) and all(want in {-1, got} for want, got in zip(wanted, shape, strict=True))
    )


NOWHERE: Final = Origin()
"""Of a request that says nothing of where it comes from."""


def objects(elements: list[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of `elements` as they are, whatever numpy would make of them."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def check_distinct(kind: str, names: Sequence[str], fault: type[HedgerowError] = InvalidInput) -> None:
    """Raise `fault` if one of `names` is there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise fault(f"{kind} {name!r}: expected each name once, got it again")
        seen.add(name)


def _type(datatype: str, shape: Sequence[int]) -> str:
    return f"{datatype} {list(shape)}"


def _list(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {_type(spec.datatype, spec.shape)}" for spec in specs) or "none"
