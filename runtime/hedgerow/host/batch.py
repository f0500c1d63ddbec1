"""Running a model for several requests at once: put together along the first dimension, run, taken apart again. Pure.

- Requests fit together if they ask for the same outputs and differ in the number of rows only. Engines see no
  parameters, so those keep nobody apart.
- A model takes batches if each of its inputs and outputs has a free first dimension, and if at the start two different
  rows gave together what each gave alone: that dimension may also be a sequence, or a mean may be taken over it.
- Answers that are not finite are a fault, but of those requests only whose rows they are, and not of requests that
  brought what is not finite themselves.
"""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedgerow import engines
from hedgerow.errors import EngineFault, HedgerowError
from hedgerow.tensors import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    Run,
    Tensor,
    TensorSpec,
    check_request,
    numpy_dtype,
)

BFLOAT16_EXPONENT = 0x7F80
BFLOAT16_ONE = 0x3F80
FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
MAX_KNOWN_SHAPES = 256
"""Kinds of requests that are remembered as checked."""
RTOL, ATOL = 1e-3, 1e-4
"""How far a row's answer may be from the one it gets alone, the second as a share of the largest value. Kernels for
other sizes round otherwise; a scale or a mean taken over the batch is far beyond it."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Fit:
    """How a request can be run: its rows, and the key that it has in common with what it may run together with."""

    rows: int
    key: Hashable | None
    """None: with nobody."""
    most: int = 1
    """Rows of a batch with it, at most."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave: an answer or an error for each request, and what it took in nanoseconds."""

    answers: Sequence[InferResponse | HedgerowError]
    input_ns: int
    infer_ns: int
    output_ns: int


class Runnable:
    """A model that is open: what it takes, and how it is run for one request or many. `run` is safe on any thread."""

    def __init__(self, session: engines.Session, metadata: ModelMetadata, version: str, *, batches: bool) -> None:
        self.metadata = metadata
        self.version = version
        self.batches = batches
        self._session = session
        self._names = tuple(spec.name for spec in metadata.outputs)
        self._datatypes = {spec.name: spec.datatype for spec in metadata.outputs}
        self._known: dict[Hashable, Fit] = {}

    def close(self) -> None:
        """Free the model; nothing may be running."""
        self._session.close()

    def fit(self, request: InferRequest, max_rows: int, max_bytes: int) -> Fit:
        """How `request` can be run in batches of up to `max_rows`, together with others of up to `max_bytes`.

        Raises `InvalidInput` if the model takes no such.
        """
        shapes = [(given.name, given.datatype, given.array.shape) for given in request.inputs]
        signature = (max_rows, request.outputs, *shapes)
        known = self._known.get(signature)
        if known is not None:
            return known
        check_request(request, self.metadata)
        fit = Fit(1, None)
        if self.batches:
            rows = {shape[0] for _, _, shape in shapes}
            if len(rows) == 1:
                count = rows.pop()
                key = (request.outputs, *sorted((name, shape[1:]) for name, _, shape in shapes))
                each_bytes = sum(given.array.nbytes for given in request.inputs) // max(1, count)
                most = min(max_rows, max(1, max_bytes // max(1, each_bytes)))
                fit = Fit(count, key if count <= max_rows else None, most)
        if len(self._known) < MAX_KNOWN_SHAPES:
            self._known[signature] = fit
        return fit

    def run(self, requests: Sequence[InferRequest], rows: Sequence[int], size: int) -> Outcome:
        """Answer `requests` of so many `rows` each in one run, padded to `size` rows.

        A request of its own, which is not padded, may be anything that the model takes. Raises what the engine raises.
        """
        started = time.perf_counter_ns()
        total = sum(rows)
        whole = len(requests) == 1 and size == total
        names = requests[0].outputs or self._names
        inputs = (
            {t.name: np.require(t.array, requirements="A") for t in requests[0].inputs}
            if whole
            else join(requests, size - total)
        )
        ready = time.perf_counter_ns()
        arrays = self._session.run(inputs, names)
        ended = time.perf_counter_ns()
        for array in arrays.values():
            array.flags.writeable = False  # several may read it, and it is sent from where it lies
        parts = [arrays] if whole else self._split(arrays, rows, size)
        broken = {name for name in names if not finite(arrays[name], self._datatypes[name])}
        run, first = None if whole else Run(arrays), 0
        answers = []
        for request, part, count in zip(requests, parts, rows, strict=True):
            answers.append(self._answer(request, part, broken, run, first))
            first += count
        return Outcome(answers, ready - started, ended - ready, time.perf_counter_ns() - ended)

    def _split(self, arrays: Arrays, rows: Sequence[int], size: int) -> list[Arrays]:
        try:
            return split(arrays, rows, size)
        except EngineFault:
            self.batches = False  # from now on; who is in batches already is answered alone after the fault
            self._known.clear()
            raise

    def _answer(
        self, request: InferRequest, arrays: Arrays, suspects: set[str], run: Run | None, first: int
    ) -> InferResponse | HedgerowError:
        """The answer in `arrays`, which are the rows from `first` on of a `run`.

        The `suspects` are the outputs that are not finite in some request's rows.
        """
        for name in suspects:
            # What came in as NaN may go out as NaN: that is the model's answer, not its fault.
            if not finite(arrays[name], self._datatypes[name]) and all(
                finite(given.array, given.datatype) for given in request.inputs
            ):
                return EngineFault(f"output {name!r} of {self.metadata.name} {self.version} is not finite")
        return InferResponse(
            model=request.model,
            version=self.version,
            id=request.id,
            outputs=tuple([Tensor(name, self._datatypes[name], array) for name, array in arrays.items()]),
            run=run,
            first=first,
            source=self.metadata,
        )


def join(requests: Sequence[InferRequest], padding: int = 0) -> Arrays:
    """The inputs of all requests, one after the other along the first dimension, and `padding` times the last row."""
    arrays: Arrays = {}
    for position, given in enumerate(requests[0].inputs):
        parts = [_input(request, position, given.name) for request in requests]
        if padding:
            last = next(part for part in reversed(parts) if len(part))[-1:]
            parts += [last] * padding
        arrays[given.name] = np.concatenate(parts)
    return arrays


def split(arrays: Arrays, rows: Sequence[int], size: int) -> list[Arrays]:
    """The outputs of `size` rows, for requests of so many `rows` each; views. What is beyond them is padding."""
    for name, array in arrays.items():
        if not array.ndim or len(array) != size:
            raise EngineFault(f"output {name!r} has shape {list(array.shape)}, expected {size} rows")
    parts: list[Arrays] = []
    start = 0
    for count in rows:
        parts.append({name: array[start : start + count] for name, array in arrays.items()})
        start += count
    return parts


def finite(array: NDArray[Any], datatype: str) -> bool:
    """Whether there is no NaN and no infinity."""
    if datatype not in FLOATS:
        return True
    if datatype == "BF16":
        return bool(((array & BFLOAT16_EXPONENT) != BFLOAT16_EXPONENT).all())
    return bool(np.isfinite(array).all())


def takes_batches(session: engines.Session) -> bool:
    """Whether the model answers each row as if it were alone, as far as two rows can show. Runs it three times."""
    specs = (*session.inputs, *session.outputs)
    if not session.inputs or not all(spec.shape[:1] == (-1,) for spec in specs):
        return False
    names = [spec.name for spec in session.outputs]
    rows = [{spec.name: _row(spec, which) for spec in session.inputs} for which in (0, 1)]
    both = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    try:
        alone, together = [session.run(row, names) for row in rows], session.run(both, names)
    except HedgerowError:
        return False
    return all(_same(together[name], [answer[name] for answer in alone]) for name in names)


def zeros(spec: TensorSpec) -> NDArray[Any]:
    """An array of zeros, or of empty texts, that fits `spec`, with 1 for each size that it leaves open."""
    shape = tuple(1 if size < 0 else size for size in spec.shape)
    if spec.datatype == "BYTES":
        return np.full(shape, b"", dtype=object)
    return np.zeros(shape, numpy_dtype(spec.datatype))


def _row(spec: TensorSpec, which: int) -> NDArray[Any]:
    """One of two rows that differ: fractions and larger ones, or 1 and 0, which most models take for indices too."""
    array = zeros(spec)
    if spec.datatype in {"FP16", "FP32", "FP64"}:
        ramp = np.linspace(0.25, 1, array.size)
        array[...] = (-3 * ramp[::-1] if which else ramp).reshape(array.shape)
    elif not which:
        array[...] = {"BYTES": b"1", "BF16": BFLOAT16_ONE}.get(spec.datatype, 1)
    return array


def _same(together: NDArray[Any], alone: Sequence[NDArray[Any]]) -> bool:
    if not all(len(array) == 1 for array in alone) or len(together) != len(alone):
        return False
    apart = np.concatenate(alone)
    if apart.dtype.kind != "f":
        return together.shape == apart.shape and bool((together == apart).all())
    scale = float(np.max(np.abs(apart[np.isfinite(apart)]), initial=0))
    return together.shape == apart.shape and np.allclose(together, apart, rtol=RTOL, atol=ATOL * scale, equal_nan=True)


def _input(request: InferRequest, position: int, name: str) -> NDArray[Any]:
    """The input called `name`, most often at the `position` where the others have it."""
    given = request.inputs[position]
    return given.array if given.name == name else request.input(name)
