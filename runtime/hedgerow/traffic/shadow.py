"""Shadow: a share of the requests for a model is also put to a candidate, and both answers are held against each other.

The caller comes first. A copy is made after the caller has an answer, nobody waits for what becomes of it, and it is
dropped, not queued, where there are too many. The rules:

- requests that failed or were streamed are not shadowed; nor, unless the candidate is marked `local`, those that must
  not leave the device or must not teach anything;
- a copy says nothing of who asks: it is no tenant's to pay for, and no part of the caller's trace;
- whatever the candidate does, crashing and never answering among it, is counted and nothing else.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec.structs import replace

from hedgerow.backend import Around, Backend, Deadline
from hedgerow.config import Count, Seconds, Settings, Share
from hedgerow.errors import DeadlineExceeded, HedgerowError
from hedgerow.latency import LatencyWindow
from hedgerow.policies import Privacy
from hedgerow.tensors import InferRequest, InferResponse, Origin, Tensor
from hedgerow.traffic.agreement import ByValue, Compare, Comparison
from hedgerow.traffic.facts import payload_bytes, privacy
from hedgerow.traffic.rendezvous import Points

INLINE_BYTES = 64 * 1024
"""Of two answers that are compared on the event loop; larger ones on a thread."""
TIMEOUT = "timeout"
"""The protocol's parameter for the caller's patience, which is not the candidate's."""

log = logging.getLogger(__name__)


class ShadowSettings(Settings, frozen=True, kw_only=True):
    """Which requests a candidate gets to see, and what it may cost."""

    model: str
    """The candidate's name where it is served."""
    version: str = ""
    """Empty: the one that is served there."""
    share: Share = 0.1
    """Of the requests."""
    timeout_s: Seconds = 10.0
    max_concurrent: Count = 1
    max_queue: Count = 32
    """Copies that wait; more are dropped."""
    max_bytes: Count = 64 * 1024 * 1024
    """Of all copies together, with the answers that they are held against; more are dropped."""
    comparison: Literal["classes", "values"] = "classes"
    """Answers agree where the best class is the same, or where no number is further apart than `tolerance`. By classes,
    what cannot be scores of classes is compared by value too."""
    tolerance: Annotated[float, msgspec.Meta(ge=0)] = 1e-3


@dataclass(slots=True)
class ShadowCounts:
    """What came of the requests that a candidate was to see."""

    agreed: int = 0
    differed: int = 0
    dropped: int = 0
    """For want of room."""
    private: int = 0
    """Not shown, because the request forbids it."""
    failed: Counter[str] = field(default_factory=Counter)
    """By the name of the error's gRPC status."""
    furthest: float = 0.0
    """The largest difference of two numbers so far."""
    current: LatencyWindow = field(default_factory=LatencyWindow)
    """How long the callers' answers took, of the requests that were sampled."""
    candidate: LatencyWindow = field(default_factory=LatencyWindow)
    """How long the candidate's took."""


@dataclass(frozen=True, slots=True)
class _Copy:
    request: InferRequest
    answer: InferResponse
    size: int


class Mirror:
    """The shadow of one model: `settings.model` of `backend`. Belongs to one event loop.

    `local`: whether the candidate may see requests that must not leave the device or be learnt from. `compare` is used
    instead of what the settings say.
    """

    def __init__(
        self, backend: Backend, settings: ShadowSettings, *, local: bool = False, compare: Compare | None = None
    ) -> None:
        self.backend = backend
        self.share = settings.share
        """Of the requests; may be changed at any time."""
        self.counts = ShadowCounts()
        self._settings = settings
        self._local = local
        self._compare = compare or ByValue(settings.tolerance, classes=settings.comparison == "classes")
        self._points = Points()
        self._queue: asyncio.Queue[_Copy] = asyncio.Queue(settings.max_queue)
        self._bytes = 0
        """Of all copies that wait or are worked on."""
        self._broken = False

    def samples(self) -> bool:
        """Whether the next request is one to be shadowed."""
        return self._points.take() < self.share

    def show(self, request: InferRequest, answer: InferResponse, took_s: float) -> None:
        """Have the candidate see `request`, which was answered after `took_s`. Never waits, never raises."""
        self.counts.current.add(took_s)
        if not self._local and privacy(request) is not Privacy.DEFAULT:
            self.counts.private += 1
            return
        size = payload_bytes(request.inputs) + payload_bytes(answer.outputs)
        if self._queue.full() or self._bytes + size > self._settings.max_bytes:
            self.counts.dropped += 1
            return
        asked = replace(
            request,
            model=self._settings.model,
            version=self._settings.version,
            inputs=tuple(map(_kept, request.inputs)),
            parameters={name: value for name, value in request.parameters.items() if name != TIMEOUT},
            origin=Origin(hops=request.origin.hops),
        )
        self._bytes += size
        self._queue.put_nowait(_Copy(asked, replace(answer, outputs=tuple(map(_kept, answer.outputs))), size))

    async def run(self) -> None:
        """Put copies to the candidate until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._settings.max_concurrent):
                group.create_task(self._work(), name=f"shadow-{self._settings.model}-{number}")

    async def _work(self) -> None:
        while True:
            copy = await self._queue.get()
            try:
                comparison = await self._try(copy)
            except HedgerowError as error:
                self.counts.failed[error.status.name] += 1
            except Exception:
                self.counts.failed[HedgerowError.status.name] += 1
                if not self._broken:
                    self._broken = True
                    log.exception("the shadow %s is broken; this is said once", self._settings.model)
            else:
                self.counts.agreed += comparison.agreed
                self.counts.differed += not comparison.agreed
                self.counts.furthest = max(self.counts.furthest, comparison.furthest)
            finally:
                self._bytes -= copy.size

    async def _try(self, copy: _Copy) -> Comparison:
        timeout_s, started = self._settings.timeout_s, time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.backend.infer(copy.request, Deadline.after(timeout_s))
        except TimeoutError:
            self.counts.candidate.add_bound(timeout_s)
            raise DeadlineExceeded(f"{self._settings.model} did not answer its shadow's request in time") from None
        self.counts.candidate.add(time.monotonic() - started)
        if copy.size <= INLINE_BYTES:
            return self._compare(copy.answer, answer)
        return await asyncio.to_thread(self._compare, copy.answer, answer)


class Shadow(Around):
    """`backend`, with the requests for some models shadowed. Closing it closes all backends.

    Belongs to one event loop. `run` does the work; without it, copies are dropped once the queues are full.
    """

    def __init__(self, backend: Backend, mirrors: Mapping[str, Mirror]) -> None:
        super().__init__(backend)
        self.mirrors = mirrors
        """By model."""

    async def run(self) -> None:
        """Put copies to the candidates until cancelled."""
        async with asyncio.TaskGroup() as group:
            for model, mirror in self.mirrors.items():
                group.create_task(mirror.run(), name=f"shadow-{model}")

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`: the backend's answer, as soon as it is there."""
        mirror = self.mirrors.get(request.model)
        if mirror is None or not mirror.samples():
            return await self._backend.infer(request, deadline)
        started = time.monotonic()
        answer = await self._backend.infer(request, deadline)
        mirror.show(request, answer, time.monotonic() - started)
        return answer

    def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`; streams are not shadowed."""
        return self._backend.stream(request, deadline)

    async def close(self) -> None:
        """See `Backend`."""
        backends = [self._backend, *(mirror.backend for mirror in self.mirrors.values())]
        for backend in {id(one): one for one in backends}.values():
            await backend.close()


def _kept(tensor: Tensor) -> Tensor:
    """`tensor` as it is now, whatever its owner does with it later: what is read-only stays, which is what arrives."""
    return tensor if not tensor.array.flags.writeable else replace(tensor, array=tensor.array.copy())
