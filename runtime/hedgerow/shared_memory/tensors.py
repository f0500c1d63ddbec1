"""Tensors of requests and answers that lie in regions: taken from there, and put there.

Inputs are copied before anything is checked, so what is changed meanwhile changes nothing; how much is copied at any
time is bounded. Everything behind this sees requests and answers as if they had come and gone in messages.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import numpy as np

from hedgerow.errors import EngineFault, InvalidInput, Overloaded
from hedgerow.oip.classification import CLASSIFICATION
from hedgerow.oip.messages import Raw, Raws, response_to_proto, to_raw
from hedgerow.proto import oip_pb2
from hedgerow.shared_memory.regions import Region, Regions
from hedgerow.tensors import DTYPES, InferResponse, Tensor

RETRY_AFTER_S = 1.0
"""When a caller who found no room for copies may try again."""

PREFIX: Final = "shared_memory_"
REGION: Final = f"{PREFIX}region"
BYTE_SIZE: Final = f"{PREFIX}byte_size"
OFFSET: Final = f"{PREFIX}offset"
"""Parameters of a tensor: where it lies, by the names of the extension. The offset counts from the region's start."""

Parameters = Mapping[str, oip_pb2.InferParameter]
_Asked = oip_pb2.ModelInferRequest.InferInputTensor | oip_pb2.ModelInferRequest.InferRequestedOutputTensor


class Place(msgspec.Struct, frozen=True):
    """Where a request wants a tensor to lie. `where` names the tensor, for errors."""

    where: str
    region: Region
    offset: int
    byte_size: int


class SharedTensors:
    """Those of one server, in its `regions`. Of inputs, `max_copied_bytes` are held at once."""

    def __init__(self, regions: Regions, max_copied_bytes: int) -> None:
        self.regions = regions
        self._max_copied_bytes = max_copied_bytes
        self._copied_bytes = 0

    @contextmanager
    def lent(self, message: oip_pb2.ModelInferRequest, raws: Raws) -> Iterator[tuple[Raws, dict[str, Place]]]:
        """The raw contents of all inputs of `message`, and where its outputs are wanted.

        `message` names no region any more then. `raws` has the contents of those inputs that lie in none. Raises
        `NotFound` and `InvalidInput`, naming tensor and region, and `Overloaded` if too much is copied already. Copies
        count until the ``with`` is left.
        """
        inputs = [self._place(f"input {one.name!r}", one) for one in message.inputs]
        outputs = {one.name: self._place(f"output {one.name!r}", one) for one in message.outputs}
        for asked in message.outputs:
            if outputs[asked.name] is not None and CLASSIFICATION in asked.parameters:
                theirs = f"output can't set both {REGION!r} and {CLASSIFICATION!r}"
                raise self.regions.fault(
                    InvalidInput, theirs, f"output {asked.name!r}: expected a region or classes, got both"
                )
        places = {name: place for name, place in outputs.items() if place is not None}
        for place in places.values():
            place.region.check(place.where, place.offset, place.byte_size, write=True)
        size = sum(place.byte_size for place in inputs if place is not None)
        if self._copied_bytes + size > self._max_copied_bytes:
            raise Overloaded(
                f"there is no room for {size} bytes of inputs: {self._copied_bytes} of"
                f" {self._max_copied_bytes} are being worked on",
                retry_after_s=RETRY_AFTER_S if size <= self._max_copied_bytes else None,
            )
        self._copied_bytes += size
        try:
            yield _filled(message, inputs, raws), places
        finally:
            self._copied_bytes -= size

    def placed(self, response: InferResponse, places: Mapping[str, Place]) -> oip_pb2.ModelInferResponse:
        """The message for `response`, its outputs of `places` written there: they carry parameters and no contents.

        Raises `InvalidInput`, naming output and region, if one does not fit.
        """
        left = []
        for output in response.outputs:
            place = places.get(output.name)
            if place is None:
                left.append(output)
                continue
            raw = to_raw("output", output, EngineFault)
            size = raw.nbytes if isinstance(raw, memoryview) else len(raw)
            if size > place.byte_size:
                theirs = (
                    f"shared memory size specified with the request for output {output.name!r} ({place.byte_size}"
                    f" bytes) should be at least {size} bytes to hold the results"
                )
                ours = f"{place.where}: it has {size} bytes, and {place.byte_size} of {place.region.name!r} are for it"
                raise self.regions.fault(InvalidInput, theirs, ours)
            place.region.write(place.where, place.offset, raw)
            # Something without contents holds its place: clients look for those of the others by position.
            left.append(Tensor(output.name, output.datatype, np.empty(0, DTYPES[output.datatype])))
        message = response_to_proto(msgspec.structs.replace(response, outputs=tuple(left)))
        for output, told in zip(response.outputs, message.outputs, strict=True):
            place = places.get(output.name)
            if place is not None:
                told.shape[:] = output.shape
                told.parameters[REGION].string_param = place.region.name
                told.parameters[BYTE_SIZE].int64_param = place.byte_size
                if place.offset:
                    told.parameters[OFFSET].int64_param = place.offset
        return message

    def _place(self, where: str, tensor: _Asked) -> Place | None:
        """What `tensor` says of a region, and does not say any more; None if nothing."""
        told = {key: tensor.parameters[key] for key in tensor.parameters if key.startswith(PREFIX)}
        if not told:
            return None
        name, size = told[REGION].string_param if REGION in told else "", _number(where, told, BYTE_SIZE)
        offset = _number(where, told, OFFSET)
        for key in told:
            del tensor.parameters[key]
        region = self.regions.find(name, where)
        if offset + size > region.byte_size:
            theirs = f"Invalid offset + byte size for shared memory region: {name!r}"
            ours = f"{where}: region {name!r} has {region.byte_size} bytes, got {size} from {offset} on"
            raise self.regions.fault(InvalidInput, theirs, ours)
        return Place(where, region, offset, size)


def names_regions(message: oip_pb2.ModelInferRequest) -> bool:
    """Whether a tensor of `message` lies in shared memory, or is wanted there."""
    tensors: tuple[_Asked, ...] = (*message.inputs, *message.outputs)
    return any(key.startswith(PREFIX) for tensor in tensors for key in tensor.parameters)


def _filled(message: oip_pb2.ModelInferRequest, places: Sequence[Place | None], raws: Raws) -> Raws:
    """The raw contents of all inputs: out of regions, and from `raws` in their order."""
    if not any(places):
        return raws
    own = iter(raws)
    filled: list[Raw] = []
    for tensor, place in zip(message.inputs, places, strict=True):
        typed = tensor.HasField("contents") and tensor.contents.ByteSize()
        if place is not None and not typed:
            filled.append(place.region.read(place.where, place.offset, place.byte_size))
        elif (raw := None if typed else next(own, None)) is not None:
            filled.append(raw)
        else:
            raise InvalidInput(
                f"input {tensor.name!r}: expected each input of a request to lie in a region or to have raw contents,"
                f" got {'typed contents' if typed else 'neither'}"
            )
    if rest := len(list(own)):
        raise InvalidInput(f"expected a raw entry for each input outside shared memory, got {rest} more")
    return filled


def _number(where: str, told: Parameters, key: str) -> int:
    """What the parameter `key` says; 0 if it is not there."""
    if key not in told:
        return 0
    choice = told[key].WhichOneof("parameter_choice")
    value = getattr(told[key], choice) if choice in {"int64_param", "uint64_param"} else -1
    if value < 0:
        raise InvalidInput(f"{where}: expected {key} to be an integer of zero or more")
    return int(value)
