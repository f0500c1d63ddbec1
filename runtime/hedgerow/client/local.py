"""Clients of a `Backend` in this process: the calls, results and errors of those over gRPC, without any of it."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from hedgerow.backend import Backend, Deadline
from hedgerow.client.drivers import Awaiting, Blocking, Item, StreamTerms
from hedgerow.client.interface import DEFAULT_TIMEOUT_S, Outcome
from hedgerow.client.loop_thread import LoopThread
from hedgerow.client.plans import Ask, Describe, IsReady, Plans, Refused, message, result
from hedgerow.client.retries import MAX_ATTEMPTS
from hedgerow.errors import DeadlineExceeded, HedgerowError
from hedgerow.oip.classification import classified
from hedgerow.proto import oip_pb2
from hedgerow.rpc import public
from hedgerow.telemetry.logs import REQUEST
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Tensor, check_request, numpy_dtype

ANSWERS_AHEAD = 16
"""Answers to one request of a stream that may wait for the caller to take those before."""

_Queue = asyncio.Queue[Outcome | None]


class AsyncLocalClient(Awaiting):
    """Asks `backend`, which stays its owner's to close. Inputs are copied: the caller may write to them afterwards."""

    def __init__(self, backend: Backend, *, timeout_s: float = DEFAULT_TIMEOUT_S, attempts: int = MAX_ATTEMPTS) -> None:
        super().__init__(Plans(timeout_s, attempts))
        self._local = _Local(backend, timeout_s)

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _take(self, step: Ask | Describe | IsReady, deadline: Deadline) -> Any:
        return await self._local.take(step, deadline)

    @asynccontextmanager
    async def _stream(
        self, items: AsyncGenerator[Item, None], terms: StreamTerms
    ) -> AsyncIterator[AsyncIterator[Outcome]]:
        room = asyncio.Semaphore(terms.read_ahead)
        stream, raised = _Stream(self._local, terms, room.release), None

        async def admitted() -> AsyncGenerator[Item, None]:
            async with aclosing(items):
                await room.acquire()
                async for item in items:
                    yield item
                    await room.acquire()

        async def outcomes() -> AsyncGenerator[Outcome, None]:
            while (outcome := await stream.next()) is not None:
                yield outcome

        async with asyncio.TaskGroup() as group:
            runner = group.create_task(stream.run(admitted()))
            try:
                async with aclosing(outcomes()) as answers:
                    yield answers
            except Exception as error:  # noqa: BLE001 (the group would raise it wrapped)
                raised = error
            finally:
                runner.cancel()
        if raised is not None:
            raise raised


class LocalClient(Blocking):
    """`AsyncLocalClient` for those who block. It runs the backend in an event loop of its own, in a thread.

    What belongs to one event loop is best opened there: give an async context manager that gives the backend; it is
    entered at once and left by `close`. A backend itself stays its owner's to close.
    """

    def __init__(
        self,
        backend: Backend | AbstractAsyncContextManager[Backend],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        attempts: int = MAX_ATTEMPTS,
    ) -> None:
        super().__init__(Plans(timeout_s, attempts))
        opening = backend if isinstance(backend, AbstractAsyncContextManager) else nullcontext(backend)
        self._loop = LoopThread(opening)
        self._local = _Local(self._loop.opened, timeout_s)

    def close(self) -> None:
        """See `InferenceClient`."""
        self._loop.close()

    def _take(self, step: Ask | Describe | IsReady, deadline: Deadline) -> Any:
        return self._loop.run(self._local.take(step, deadline))

    @contextmanager
    def _stream(self, items: Iterator[Item], terms: StreamTerms) -> Iterator[Iterator[Outcome]]:
        room, left = threading.Semaphore(terms.read_ahead), threading.Event()
        stream = _Stream(self._local, terms, room.release)
        read = asyncio.Queue[Item | Exception | None]()  # bounded by the room

        def feed() -> None:
            item: Item | Exception | None = None
            while room.acquire() and not left.is_set():
                try:
                    item = next(items, None)
                except Exception as error:  # noqa: BLE001 (the caller's own, which is raised where they see it)
                    item = error
                if not self._loop.call(read.put_nowait, item) or item is None or isinstance(item, Exception):
                    return

        async def fed() -> AsyncGenerator[Item, None]:
            while (item := await read.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item

        def outcomes() -> Iterator[Outcome]:
            while (outcome := self._loop.run(stream.next())) is not None:
                yield outcome

        runner = self._loop.start(stream.run(fed()))
        threading.Thread(target=feed, name="hedgerow-stream", daemon=True).start()
        try:
            yield outcomes()
        finally:
            left.set()
            room.release()
            runner.cancel()


class _Local:
    """Takes steps by asking a backend as `hedgerow.oip.service` would."""

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self._backend = backend
        self._timeout_s = timeout_s

    async def take(self, step: Ask | Describe | IsReady, deadline: Deadline) -> Any:
        """What `step` gives."""
        with _public_errors(deadline):
            async with asyncio.timeout_at(deadline.at):
                match step:
                    case Ask():
                        with _logged(step.request):
                            request, wanted, metadata = await self._checked(step, deadline)
                            response = await self._backend.infer(request, deadline)
                            return _presented(response, request, wanted, metadata)
                    case Describe(model, version):
                        return await self._backend.metadata(model, version)
                    case IsReady("", _):
                        states = await self._backend.models()
                        return {state.name for state in states} == {state.name for state in states if state.ready}
                    case IsReady(model, version):
                        return await self._backend.ready(model, version)

    async def stream(self, ask: Ask, deadline: Deadline, give: Callable[[Outcome], Awaitable[None]]) -> None:
        """Give the answers to one request of a stream, which like any other has its time."""
        deadline = min(deadline, Deadline.after(self._timeout_s), key=lambda one: one.at)
        with _public_errors(deadline), _logged(ask.request):
            async with asyncio.timeout_at(deadline.at):
                request, wanted, metadata = await self._checked(ask, deadline)
                responses = self._backend.stream(request, deadline)
                try:
                    async for response in responses:
                        await give(result(_presented(response, request, wanted, metadata)))
                finally:
                    if isinstance(responses, AsyncGenerator):
                        await responses.aclose()

    async def _checked(
        self, ask: Ask, deadline: Deadline
    ) -> tuple[InferRequest, oip_pb2.ModelInferRequest, ModelMetadata]:
        """The request as the backend gets it, the outputs that it wants, and the model's interface."""
        deadline.check("the request could be started")
        request = ask.request
        # What has no form on the wire is not taken here either; all but numbers, which always have one, is written.
        text = tuple(one for one in request.inputs if one.datatype == "BYTES")
        wanted = message(dataclasses.replace(ask, request=replace(request, inputs=text)))
        metadata = await self._backend.metadata(request.model, request.version)
        check_request(request, metadata)
        return replace(request, inputs=tuple(_own(one) for one in request.inputs)), wanted, metadata


class _Stream:
    """The outcomes of a stream's items in their order. Several are worked on at once.

    Whoever makes the items sees to it that there are not too many; `finished` is called as one is done with.
    """

    def __init__(self, local: _Local, terms: StreamTerms, finished: Callable[[], object]) -> None:
        self._local = local
        self._terms = terms
        self._finished = finished
        self._waiting: asyncio.Queue[_Queue | None] = asyncio.Queue()
        self._current: _Queue | None = None
        self._broken: Exception | None = None

    async def run(self, items: AsyncGenerator[Item, None]) -> None:
        """Work on `items` until they end or this is cancelled."""
        async with asyncio.TaskGroup() as group:
            try:
                async with aclosing(items):
                    async for item in items:
                        answers = _Queue(ANSWERS_AHEAD)
                        self._waiting.put_nowait(answers)
                        group.create_task(self._answer(item, answers))
            except Exception as error:  # noqa: BLE001 (the caller's own, which is raised where they see it)
                self._broken = error
            self._waiting.put_nowait(None)

    async def next(self) -> Outcome | None:
        """The next outcome, None after the last one."""
        try:
            async with asyncio.timeout_at(self._terms.deadline.at):
                while True:
                    self._current = self._current or await self._waiting.get()
                    if self._current is None:
                        break
                    if (outcome := await self._current.get()) is not None:
                        return outcome
                    self._current = None
                    self._finished()
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the stream had ended") from None
        if self._broken is not None:
            raise self._broken
        return None

    async def _answer(self, item: Item, answers: _Queue) -> None:
        try:
            if isinstance(item, Refused):
                raise item.error
            await self._local.stream(item, self._terms.deadline, answers.put)
        except HedgerowError as error:
            await answers.put(self._terms.failed(item.request.id, error))
        await answers.put(None)


@contextmanager
def _public_errors(deadline: Deadline) -> Iterator[None]:
    """Let only such errors out as callers may see."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TimeoutError) and deadline.expired:
            raise DeadlineExceeded("the deadline passed while the request was being worked on") from error
        raise public(error, "a local call") from error


@contextmanager
def _logged(request: InferRequest) -> Iterator[None]:
    """What is logged meanwhile names `request`."""
    token = REQUEST.set(replace(request, inputs=()))  # timers keep the context of who began them
    try:
        yield
    finally:
        REQUEST.reset(token)


def _own(given: Tensor) -> Tensor:
    """A copy of the caller's array, as it would have come over the wire. Text has been copied already."""
    if given.datatype == "BYTES":
        return given
    return Tensor(given.name, given.datatype, np.array(given.array, numpy_dtype(given.datatype), order="C"))


def _presented(
    response: InferResponse, request: InferRequest, wanted: oip_pb2.ModelInferRequest, metadata: ModelMetadata
) -> InferResponse:
    """`response` as the service would send it."""
    named = replace(response, model=request.model, id=request.id)
    given = classified(named, wanted, metadata)
    return replace(given, outputs=tuple(Tensor(one.name, one.datatype, _read_only(one.array)) for one in given.outputs))


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view
