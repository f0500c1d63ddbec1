"""The clients' methods, blocking and awaiting, over whatever takes the steps of `hedgerow.client.plans`."""

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, Unpack, cast

from hedgerow.backend import Deadline
from hedgerow.client.interface import (
    READ_AHEAD,
    Answers,
    AsyncAnswers,
    AsyncInferenceClient,
    InferenceClient,
    InferOptions,
    Inputs,
    Options,
    Outcome,
    Result,
)
from hedgerow.client.plans import Ask, Describe, IsReady, Pause, Plan, Plans, R, Refused, origin
from hedgerow.errors import HedgerowError, InvalidInput
from hedgerow.tensors import ModelMetadata, Origin

Item = Ask | Refused
"""One request of a stream."""


@dataclass(frozen=True, slots=True)
class StreamTerms:
    """What holds for all of one stream."""

    read_ahead: int
    deadline: Deadline
    origin: Origin
    failed: Callable[[str, HedgerowError], HedgerowError]
    """Makes the error of the request with that id what the caller is given."""


class Blocking(InferenceClient):
    """Runs plans by blocking."""

    def __init__(self, plans: Plans) -> None:
        self._plans = plans

    def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Result:
        """See `InferenceClient`."""
        deadline = self._plans.deadline(options.get("timeout_s"))
        return self._run(self._plans.infer(model, inputs, options, deadline), deadline)

    def infer_many(self, model: str, inputs: Iterable[Inputs], **options: Unpack[Options]) -> list[Result]:
        """See `InferenceClient`."""
        with self.stream(model, inputs, **options) as answers:
            return list(answers)

    @contextmanager
    def stream(
        self, model: str, inputs: Iterable[Inputs], *, read_ahead: int = READ_AHEAD, **options: Unpack[Options]
    ) -> Iterator[Answers]:
        """See `InferenceClient`."""
        items = (
            self._run(self._plans.item(model, one, options, str(place)), self._plans.deadline(None))
            for place, one in enumerate(inputs)
        )
        with self._stream(items, _terms(self._plans, model, read_ahead, options)) as outcomes:
            yield Answers(outcomes)

    def metadata(self, model: str, version: str = "", *, timeout_s: float | None = None) -> ModelMetadata:
        """See `InferenceClient`."""
        deadline = self._plans.deadline(timeout_s)
        return self._run(self._plans.metadata(model, version, deadline), deadline)

    def ready(self, model: str = "", version: str = "", *, timeout_s: float | None = None) -> bool:
        """See `InferenceClient`."""
        return self._run(self._plans.ready(model, version), self._plans.deadline(timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, plan: Plan[R], deadline: Deadline) -> R:
        step = partial(next, plan)
        while True:
            try:
                wanted = step()
            except StopIteration as end:
                return cast("R", end.value)
            try:
                if isinstance(wanted, Pause):
                    time.sleep(wanted.seconds)  # the pause before a retry, which the plan has bounded
                    step = partial(next, plan)
                else:
                    step = partial(plan.send, self._take(wanted, deadline))
            except HedgerowError as error:
                step = partial(plan.throw, error)

    @abstractmethod
    def _take(self, step: Ask | Describe | IsReady, deadline: Deadline) -> Any:
        """What `step` gives."""

    @abstractmethod
    def _stream(self, items: Iterator[Item], terms: StreamTerms) -> AbstractContextManager[Iterator[Outcome]]:
        """The outcomes of `items`."""


class Awaiting(AsyncInferenceClient):
    """Runs plans by awaiting."""

    def __init__(self, plans: Plans) -> None:
        self._plans = plans

    async def infer(self, model: str, inputs: Inputs, **options: Unpack[InferOptions]) -> Result:
        """See `InferenceClient`."""
        deadline = self._plans.deadline(options.get("timeout_s"))
        return await self._run(self._plans.infer(model, inputs, options, deadline), deadline)

    async def infer_many(
        self, model: str, inputs: Iterable[Inputs] | AsyncIterable[Inputs], **options: Unpack[Options]
    ) -> list[Result]:
        """See `InferenceClient`."""
        async with self.stream(model, inputs, **options) as answers:
            return [result async for result in answers]

    @asynccontextmanager
    async def stream(
        self,
        model: str,
        inputs: Iterable[Inputs] | AsyncIterable[Inputs],
        *,
        read_ahead: int = READ_AHEAD,
        **options: Unpack[Options],
    ) -> AsyncIterator[AsyncAnswers]:
        """See `InferenceClient`."""

        async def items() -> AsyncGenerator[Item, None]:
            place = 0
            async for one in inputs if isinstance(inputs, AsyncIterable) else _each(inputs):
                plan = self._plans.item(model, one, options, str(place))
                yield await self._run(plan, self._plans.deadline(None))
                place += 1

        async with self._stream(items(), _terms(self._plans, model, read_ahead, options)) as outcomes:
            yield AsyncAnswers(outcomes)

    async def metadata(self, model: str, version: str = "", *, timeout_s: float | None = None) -> ModelMetadata:
        """See `InferenceClient`."""
        deadline = self._plans.deadline(timeout_s)
        return await self._run(self._plans.metadata(model, version, deadline), deadline)

    async def ready(self, model: str = "", version: str = "", *, timeout_s: float | None = None) -> bool:
        """See `InferenceClient`."""
        return await self._run(self._plans.ready(model, version), self._plans.deadline(timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, plan: Plan[R], deadline: Deadline) -> R:
        step = partial(next, plan)
        while True:
            try:
                wanted = step()
            except StopIteration as end:
                return cast("R", end.value)
            try:
                if isinstance(wanted, Pause):
                    await asyncio.sleep(wanted.seconds)
                    step = partial(next, plan)
                else:
                    step = partial(plan.send, await self._take(wanted, deadline))
            except HedgerowError as error:
                step = partial(plan.throw, error)

    @abstractmethod
    async def _take(self, step: Ask | Describe | IsReady, deadline: Deadline) -> Any:
        """What `step` gives."""

    @abstractmethod
    def _stream(
        self, items: AsyncGenerator[Item, None], terms: StreamTerms
    ) -> AbstractAsyncContextManager[AsyncIterator[Outcome]]:
        """The outcomes of `items`."""


def _terms(plans: Plans, model: str, read_ahead: int, options: Options) -> StreamTerms:
    if read_ahead < 1:
        raise InvalidInput(f"read_ahead: expected at least 1 request, got {read_ahead}")
    timeout_s = options.get("timeout_s")
    deadline = Deadline.never() if timeout_s is None else Deadline.after(timeout_s)
    return StreamTerms(read_ahead, deadline, origin(options), partial(plans.failed, model, options.get("version", "")))


async def _each(inputs: Iterable[Inputs]) -> AsyncGenerator[Inputs, None]:
    for one in inputs:
        yield one
