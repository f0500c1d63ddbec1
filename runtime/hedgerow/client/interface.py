"""What every client offers, whatever is behind it: the calls, what may be said with them, and what comes back.

The options of a call are written once, as a `TypedDict` that each signature unpacks; editors show them one by one.
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypedDict, Unpack

from numpy.typing import ArrayLike, NDArray

from hedgerow.errors import HedgerowError
from hedgerow.tensors import ModelMetadata, Parameter

DEFAULT_TIMEOUT_S = 60.0
READ_AHEAD = 16
"""Requests of a stream that are read from the caller before their answers have been taken."""

Inputs = Mapping[str, ArrayLike] | ArrayLike
"""Arrays by input name; or just the array, where the model has one input."""


class Options(TypedDict, total=False):
    """What may be said with a request: keyword arguments, all of them optional.

    ======================  ============================================================================================
    `version`               of the model; the server's choice if empty
    `outputs`               names of those that are wanted; none: all
    `classes`               how many of the best classes to give of each output, in place of its values: `bytes` as in
                            ``b"0.97:7:seven"`` (value, index, and label where the model has labels)
    `timeout_s`             seconds from now, retries included; of a stream: all of it
    `priority`              1 is the highest; 0: the server's usual one
    `privacy`               "no-learning" or "edge-only": what is allowed with the inputs
    `tenant`                who asks, for quotas
    `traceparent`           the caller's span, as W3C Trace Context writes it
    `parameters`            anything else that the model or the server understands
    ======================  ============================================================================================
    """

    version: str
    outputs: Sequence[str]
    classes: int
    timeout_s: float | None
    priority: int
    privacy: str
    tenant: str
    traceparent: str
    parameters: Mapping[str, Parameter]


class InferOptions(Options, total=False):
    """`Options`, and an `id` that the answer brings back."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One answer. BYTES outputs hold `bytes`; BF16 ones hold their bits as uint16. Arrays are read-only."""

    outputs: dict[str, NDArray[Any]]
    model: str
    model_version: str
    id: str = ""
    """That of the request; in a stream its place, from "0" on."""
    tier: str | None = None
    """Who answered: "edge", "site" or "cloud"."""
    reason: str | None = None
    """Why that one."""
    confidence: float | None = None
    """What the gate made of the edge's answer, in [0, 1]."""
    release: str | None = None
    """The release that answered on the device: "digits/3"."""
    degraded: bool = False
    """Whether the gate refused this answer and nothing better could be had."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Everything the server said, as it said it."""


Outcome = Result | HedgerowError


class Answers(Iterator[Result]):
    """The answers of a stream, as they arrive.

    A request that failed raises its error in its place, so that none is passed over unseen; the stream itself goes on,
    and whoever catches the error may take the next answer. What ends the stream is raised as well: after it there is
    nothing. Where many requests are to be got through and some may fail, `outcomes` gives errors as values.
    """

    def __init__(self, outcomes: Iterator[Outcome]) -> None:
        self._outcomes = outcomes

    def outcomes(self) -> Iterator[Outcome]:
        """Answers, and in their place the errors of requests that failed, noting their ids (see `BaseException`)."""
        return self._outcomes

    def __next__(self) -> Result:
        return _good(next(self._outcomes))


class AsyncAnswers(AsyncIterator[Result]):
    """`Answers` for ``async for``."""

    def __init__(self, outcomes: AsyncIterator[Outcome]) -> None:
        self._outcomes = outcomes

    def outcomes(self) -> AsyncIterator[Outcome]:
        """See `Answers.outcomes`."""
        return self._outcomes

    async def __anext__(self) -> Result:
        return _good(await anext(self._outcomes))


def _good(outcome: Outcome) -> Result:
    if isinstance(outcome, HedgerowError):
        raise outcome
    return outcome


class InferenceClient(Protocol):
    """Asks models. Threads may share one. Close it at the end, or use it in a ``with``."""

    def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Result:
        """The model's answer."""
        ...

    def infer_many(self, model: str, inputs: Iterable[Inputs], **options: Unpack[Options]) -> list[Result]:
        """The answers to many requests, in their order; raises the first error.

        Each is a request of its own, judged and explained by itself; putting them together is up to the server.
        """
        ...

    def stream(
        self, model: str, inputs: Iterable[Inputs], *, read_ahead: int = READ_AHEAD, **options: Unpack[Options]
    ) -> AbstractContextManager[Answers]:
        """The answers to any number of requests, in a ``with``, as they arrive; a model may give several to each.

        `inputs` is read in a thread of its own, at most `read_ahead` requests ahead of the answers that were taken.
        What it raises is raised after the answers to what came before. Leaving the ``with`` cancels what is left.
        Without a `timeout_s` a stream may take for ever; each of its requests still has the time that the server gives
        it. Nothing in it is tried again.
        """
        ...

    def metadata(self, model: str, version: str = "", *, timeout_s: float | None = None) -> ModelMetadata:
        """The model's interface, asked for anew."""
        ...

    def ready(self, model: str = "", version: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether the model, or all of them, is ready. A server that cannot be reached is not."""
        ...

    def close(self) -> None:
        """Hang up; calls in flight fail. Idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class AsyncInferenceClient(Protocol):
    """`InferenceClient` for asyncio. Belongs to the event loop that it is made in."""

    async def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Result:
        """See `InferenceClient.infer`."""
        ...

    async def infer_many(
        self, model: str, inputs: Iterable[Inputs] | AsyncIterable[Inputs], **options: Unpack[Options]
    ) -> list[Result]:
        """See `InferenceClient.infer_many`."""
        ...

    def stream(
        self,
        model: str,
        inputs: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        read_ahead: int = READ_AHEAD,
        **options: Unpack[Options],
    ) -> AbstractAsyncContextManager[AsyncAnswers]:
        """See `InferenceClient.stream`; `inputs` is read on the event loop."""
        ...

    async def metadata(self, model: str, version: str = "", *, timeout_s: float | None = None) -> ModelMetadata:
        """See `InferenceClient.metadata`."""
        ...

    async def ready(self, model: str = "", version: str = "", *, timeout_s: float | None = None) -> bool:
        """See `InferenceClient.ready`."""
        ...

    async def close(self) -> None:
        """See `InferenceClient.close`."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...
