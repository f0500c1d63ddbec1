"""Answers kept for requests that come again, byte for byte the same: a backend around a backend.

The rules:

- only for the models that are named; streams are never kept. Whatever judges callers (quotas, privacy) stands in front;
- the same means: the same model file, version, inputs, requested outputs and parameters, but for those that say nothing
  of the answer (`NEUTRAL`, and what begins with `OURS`). Inputs are compared by their bytes, so -0.0 is not 0.0, and a
  NaN is like another of the same bits. The order of inputs does not count;
- the model file is known by the `sha256` in its metadata, so a swap makes what the old one said unreachable. Where
  there is none, the versions in the metadata stand for it: such a model must not change without a new version;
- errors and answers marked degraded are never kept; nor is what a model said that was replaced meanwhile;
- of requests that are the same, the first is computed and the others wait for it, each for as long as its own deadline
  allows. If the first leaves or has less time or luck with the queue, the next takes its place and computes anew;
- what is kept is bounded in bytes; the least recently used leaves first. Answers are read-only, as they are shared.
"""

import asyncio
import collections
import enum
import hashlib
import math
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec.structs import replace
from numpy.typing import NDArray

from hedgerow.backend import Around, Backend, Deadline
from hedgerow.config import Count, Settings
from hedgerow.errors import DeadlineExceeded, Forbidden, HedgerowError, Overloaded
from hedgerow.parameters import DEGRADED
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Tensor
from hedgerow.traffic.facts import payload_bytes

KEY_BYTES = 32
"""Of the digest that stands for a request: nobody finds two requests with the same one."""
ENTRY_BYTES = 1024
"""Counted for an entry besides what its arrays and texts hold: the objects around them."""
ELEMENT_BYTES = 56
"""Counted for a BYTES element besides its bytes: the object, and where it is."""
NEUTRAL = frozenset({"id", "priority", "timeout"})
"""Parameters that change nothing in an answer."""
OURS = "hedgerow_"
"""How the parameters begin that Hedgerow says to itself."""
_LENGTH = struct.Struct("<Q")  # before each BYTES element

V = TypeVar("V")


class CacheSettings(Settings, frozen=True, kw_only=True):
    """Whose answers are kept, and how many for how long."""

    models: tuple[str, ...] = ()
    max_bytes: Count = 64 * 1024 * 1024
    """Of all answers together, their keys and objects counted in."""
    ttl_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How long an answer is good for; 0: as long as its model."""
    max_request_bytes: Count = 1024 * 1024
    """Inputs of a request that is looked up: hashing takes the event loop about a millisecond for each MB."""


@dataclass(slots=True)
class CacheCounts:
    """What came of the requests for one model that were looked up."""

    hits: int = 0
    misses: int = 0
    shared: int = 0
    """Neither: they got the answer to another request that was being computed."""


class Kept(Generic[V]):
    """Values by key, within a number of bytes, the least recently used leaving first. Pure: times are given to it."""

    def __init__(self, max_bytes: int, ttl_s: float = math.inf) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._entries: collections.OrderedDict[bytes, tuple[V, int, float]] = collections.OrderedDict()
        self.bytes = 0
        self.evictions = 0
        """Entries that had to leave for others."""
        self.expired = 0
        """Entries that were found to be too old."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: float) -> V | None:
        """The value, if it is there and not older than `ttl_s`."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, _, since = entry
        if now - since >= self._ttl_s:
            self._remove(key)
            self.expired += 1
            return None
        self._entries.move_to_end(key)
        return value

    def put(self, key: bytes, value: V, size: int, now: float) -> None:
        """Keep `value`, which takes `size` bytes with its key, unless it does not fit at all."""
        self._remove(key)
        if size > self._max_bytes:
            return
        while self.bytes + size > self._max_bytes:
            self._remove(next(iter(self._entries)))
            self.evictions += 1
        self._entries[key] = (value, size, now)
        self.bytes += size

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry[1]


class _Nothing(enum.Enum):
    """What those who wait for another's answer hear when it is not for them."""

    LEFT = "nobody computes it any more"
    ALONE = "the answer was good for one only"


_Flight = asyncio.Future[InferResponse | HedgerowError | _Nothing]


class CachedBackend(Around):
    """`backend` with a memory. Belongs to one event loop."""

    def __init__(self, backend: Backend, settings: CacheSettings) -> None:
        super().__init__(backend)
        self._settings = settings
        self._flights: dict[bytes, _Flight] = {}
        self.counts = {model: CacheCounts() for model in settings.models}
        """By model."""
        self.kept: Kept[InferResponse] = Kept(settings.max_bytes, settings.ttl_s or math.inf)

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`: the answer that was kept, or that is being computed, or a new one."""
        counts = self.counts.get(request.model)
        if counts is None or payload_bytes(request.inputs) > self._settings.max_request_bytes:
            return await self._backend.infer(request, deadline)
        key = request_key(request, await self._backend.metadata(request.model, request.version))
        while True:
            deadline.check("the answer was looked up")
            if (kept := self.kept.get(key, time.monotonic())) is not None:
                counts.hits += 1
                return _copy(kept, request.id)
            flight = self._flights.get(key)
            if flight is None:
                counts.misses += 1
                return await self._compute(key, request, deadline)
            outcome = await _landed(flight, deadline)
            match outcome:
                case InferResponse():
                    counts.shared += 1
                    return _copy(outcome, request.id)
                case HedgerowError():
                    counts.shared += 1
                    raise outcome
                case _Nothing.ALONE:
                    counts.misses += 1
                    return await self._backend.infer(request, deadline)
                case _Nothing.LEFT:
                    continue

    def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`; nothing is looked up."""
        return self._backend.stream(request, deadline)

    async def _compute(self, key: bytes, request: InferRequest, deadline: Deadline) -> InferResponse:
        """The backend's answer, for all who wait for it."""
        flight: _Flight = asyncio.get_running_loop().create_future()
        self._flights[key] = flight
        outcome: InferResponse | HedgerowError | _Nothing = _Nothing.LEFT
        try:
            response = await self._backend.infer(request, deadline)
            if response.parameters.get(DEGRADED):
                outcome = _Nothing.ALONE
                return response
            outcome = _frozen(response)
            response = _copy(outcome, request.id)
            if await self._unchanged(key, request, response):
                self.kept.put(key, outcome, _response_size(outcome), time.monotonic())
        except (DeadlineExceeded, Overloaded, Forbidden):
            raise  # these are about this caller, and the next may fare better
        except HedgerowError as error:
            outcome = error
            raise
        finally:
            del self._flights[key]
            flight.set_result(outcome)
        return response

    async def _unchanged(self, key: bytes, request: InferRequest, response: InferResponse) -> bool:
        """Whether the model that the key was made for has answered, as far as can be told."""
        try:
            metadata = await self._backend.metadata(request.model, request.version)
        except HedgerowError:
            return False
        return response.version in metadata.versions and request_key(request, metadata) == key


def request_key(request: InferRequest, metadata: ModelMetadata) -> bytes:
    """What is the same for two requests if their answers must be, and for no others: see the rules above."""
    inputs = sorted(request.inputs, key=lambda one: one.name)
    model = (request.model, request.version, metadata.properties.get("sha256") or metadata.versions)
    parameters = sorted(
        (name, value) for name, value in request.parameters.items() if name not in NEUTRAL and not name.startswith(OURS)
    )
    # msgpack says where each part ends and tells types apart, so no two heads look alike.
    head = (model, request.outputs, parameters, [(t.name, t.datatype, t.array.dtype.str, t.shape) for t in inputs])
    digest = hashlib.blake2b(msgspec.msgpack.encode(head), digest_size=KEY_BYTES)
    for one in inputs:
        if one.array.dtype == object:
            for element in one.array.ravel().tolist():
                digest.update(_LENGTH.pack(len(element)))
                digest.update(element)
        else:
            digest.update(one.array.tobytes())
    return digest.digest()


async def _landed(flight: _Flight, deadline: Deadline) -> InferResponse | HedgerowError | _Nothing:
    """What comes of `flight`, which neither this caller's leaving nor its deadline ends."""
    try:
        async with asyncio.timeout(None if math.isinf(deadline.at) else deadline.remaining):
            return await asyncio.shield(flight)
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the same request, which came first, was answered") from None


def _copy(response: InferResponse, request_id: str) -> InferResponse:
    """`response` to another request."""
    return replace(response, id=request_id, parameters=dict(response.parameters))


def _frozen(response: InferResponse) -> InferResponse:
    """`response` with arrays of its own: a backend's may be parts of a batch, or written to again."""
    outputs = tuple(Tensor(one.name, one.datatype, _read_only(one.array)) for one in response.outputs)
    return replace(response, outputs=outputs, run=None, first=0)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    own = array.copy()
    own.flags.writeable = False
    return own


def _response_size(response: InferResponse) -> int:
    """Bytes that an answer takes with its key, by and large."""
    texts = (*response.parameters, *response.parameters.values(), *(one.name for one in response.outputs))
    elements = sum(one.array.size for one in response.outputs if one.array.dtype == object)
    counted = KEY_BYTES + ENTRY_BYTES + ELEMENT_BYTES * elements + sum(len(str(text)) for text in texts)
    return counted + payload_bytes(response.outputs)
