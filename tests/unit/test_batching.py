"""Requests put together and taken apart again: nothing lost, nothing mixed up, whatever the datatype and the rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from hedgerow.errors import EngineFault, InvalidInput
from hedgerow.host.batch import Runnable, finite, join, split, takes_batches
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Tensor, TensorSpec, numpy_dtype


class Function:
    """A `Session` over a Python function."""

    def __init__(self, function: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._function = function

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        answer = self._function(**inputs)
        return {name: answer[name] for name in outputs}

    def close(self) -> None:
        pass


ROOM = 2**20
X, Y = TensorSpec("x", "FP32", (-1, 2)), TensorSpec("y", "FP32", (-1, 2))


def runnable(function: Any, inputs: Sequence[TensorSpec] = (X,), outputs: Sequence[TensorSpec] = (Y,)) -> Runnable:
    session = Function(function, inputs, outputs)
    metadata = ModelMetadata("m", ("1",), "test", session.inputs, session.outputs)
    return Runnable(session, metadata, "1", batches=takes_batches(session))


def request(*tensors: Tensor, outputs: tuple[str, ...] = ()) -> InferRequest:
    return InferRequest(model="m", inputs=tensors, outputs=outputs)


def x(rows: int, value: float = 0.0) -> Tensor:
    return Tensor("x", "FP32", np.full((rows, 2), value, np.float32))


@st.composite
def requests(draw: st.DrawFn) -> list[InferRequest]:
    """Requests of two inputs, of any datatype and shape, that differ in their rows only; zero rows included."""
    given_: list[tuple[str, str, tuple[int, ...]]] = [
        (name, draw(st.sampled_from(["BYTES", "BF16", "FP16", "FP32", "INT64", "UINT8", "BOOL"])), draw(tails))
        for name in ("a", "b")
    ]
    made = []
    for rows in draw(st.lists(st.integers(0, 4), min_size=1, max_size=6)):
        tensors = [Tensor(name, kind, _array(draw, kind, (rows, *tail))) for name, kind, tail in given_]
        made.append(request(*(tensors if draw(st.booleans()) else tensors[::-1])))
    return made


tails = st.lists(st.integers(0, 3), max_size=2).map(tuple)


def _array(draw: st.DrawFn, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if kind == "BYTES":
        items = draw(st.lists(st.binary(max_size=4), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        array = np.empty(len(items), object)
        array[:] = items
        return array.reshape(shape)
    return draw(npst.arrays(numpy_dtype(kind), shape))


@given(requests(), st.integers(0, 3))
def test_what_was_put_together_is_taken_apart_into_the_same(made: list[InferRequest], padding: int) -> None:
    rows = [len(one.input("a")) for one in made]
    padding = padding if sum(rows) else 0
    arrays = join(made, padding)
    assert all(len(array) == sum(rows) + padding for array in arrays.values())
    for one, part in zip(made, split(arrays, rows, sum(rows) + padding), strict=True):
        for given_ in one.inputs:
            assert part[given_.name].dtype == given_.array.dtype
            assert part[given_.name].shape == given_.array.shape
            assert part[given_.name].tolist() == given_.array.tolist() or given_.array.dtype.kind == "f"
            np.testing.assert_array_equal(part[given_.name], given_.array)


def test_padding_repeats_a_row_and_no_caller_sees_it() -> None:
    seen = []

    def double(x: NDArray[Any]) -> dict[str, NDArray[Any]]:
        seen.append(x.tolist())
        return {"y": 2 * x}

    model = runnable(double)
    seen.clear()
    answers = model.run([request(x(1, 1.0)), request(x(0)), request(x(2, 2.0))], [1, 0, 2], 5).answers
    assert seen == [[[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]]]
    assert [one.output("y").tolist() for one in answers if isinstance(one, InferResponse)] == [
        [[2, 2]],
        [],
        [[4, 4], [4, 4]],
    ]


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (lambda x: {"y": 2 * x}, True),
        (lambda x: {"y": x - x.mean(axis=0)}, False),
        (lambda x: {"y": x / max(float(np.abs(x).max()), 1e-9)}, False),  # as dynamic quantization scales
        (lambda x: {"y": np.cumsum(x, axis=0)}, False),
        (lambda x: {"y": x[:1]}, False),
        (lambda x: {"y": x.sum(axis=0, keepdims=True)}, False),
    ],
)
def test_a_model_whose_rows_are_not_independent_takes_no_batches(function: Any, takes: bool) -> None:
    assert runnable(function).batches is takes


@pytest.mark.parametrize(
    "specs",
    [
        [TensorSpec("x", "FP32", (1, 2))],
        [TensorSpec("x", "FP32", ())],
        [X, TensorSpec("s", "FP32", ())],
        [],
    ],
)
def test_a_model_without_a_free_first_dimension_everywhere_takes_no_batches(specs: list[TensorSpec]) -> None:
    assert not runnable(lambda **given_: {"y": np.zeros((1, 2), np.float32)}, specs).batches


def test_requests_share_a_batch_only_if_they_fit_together() -> None:
    wide = TensorSpec("x", "FP32", (-1, -1))
    model = runnable(
        lambda x: {"y": x, "z": x}, [wide], [TensorSpec("y", "FP32", (-1, -1)), TensorSpec("z", "FP32", (-1, -1))]
    )

    def key(rows: int, columns: int, outputs: tuple[str, ...] = ()) -> object:
        given = request(Tensor("x", "FP32", np.zeros((rows, columns), np.float32)), outputs=outputs)
        return model.fit(given, 4, ROOM).key

    assert key(1, 2) is not None
    assert key(1, 2) == key(3, 2)
    assert key(1, 2) != key(1, 3)
    assert key(1, 2) != key(1, 2, ("y",))
    assert key(5, 2) is None, "it is larger than a batch"
    with pytest.raises(InvalidInput):
        model.fit(request(Tensor("x", "FP64", np.zeros((1, 2)))), 4, ROOM)


@pytest.mark.parametrize(("columns", "most"), [(2, 32), (2**10, 16), (2**15, 1), (2**20, 1)])
def test_large_rows_are_put_together_only_as_far_as_their_bytes_allow(columns: int, most: int) -> None:
    model = runnable(lambda x: {"y": x}, [TensorSpec("x", "FP32", (-1, -1))], [TensorSpec("y", "FP32", (-1, -1))])
    given = request(Tensor("x", "FP32", np.zeros((1, columns), np.float32)))
    assert model.fit(given, 32, 2**16).most == most


def test_inputs_that_differ_in_their_rows_go_alone() -> None:
    two = [X, TensorSpec("w", "FP32", (-1,))]
    model = runnable(lambda x, w: {"y": x * w[:, None]}, two)
    assert model.batches
    w = Tensor("w", "FP32", np.zeros(3, np.float32))
    assert model.fit(request(x(2), w), 8, ROOM).key is None
    assert model.fit(request(x(3), w), 8, ROOM).key == model.fit(request(w, x(3)), 8, ROOM).key, "whatever their order"


def test_only_those_whose_rows_are_not_finite_are_at_fault() -> None:
    model = runnable(lambda x: {"y": np.sqrt(np.where(x < -5, np.nan, np.abs(x)))})
    made = [request(x(1, 1.0)), request(x(2, -9.0)), request(x(1, np.nan)), request(x(1, 4.0))]
    good, bad, theirs, other = model.run(made, [1, 2, 1, 1], 5).answers
    assert isinstance(good, InferResponse)
    assert isinstance(other, InferResponse)
    assert isinstance(theirs, InferResponse), "what came in as NaN may go out as NaN"
    assert isinstance(bad, EngineFault)
    assert "'y'" in str(bad)


def test_a_model_that_gives_other_rows_than_it_took_is_not_given_batches_again() -> None:
    model = runnable(lambda x: {"y": x if len(x) < 3 else x[:2]})
    assert model.batches
    with pytest.raises(EngineFault, match="expected 3 rows"):
        model.run([request(x(1)), request(x(2))], [1, 2], 3)
    assert not model.batches
    assert model.fit(request(x(1)), 8, ROOM).key is None


def test_bfloat16_is_judged_by_its_bits() -> None:
    assert finite(np.array([0x3F80, 0x7F7F], np.uint16), "BF16")
    assert not finite(np.array([0x3F80, 0x7F80], np.uint16), "BF16")
    assert finite(np.array([0xFFFF], np.uint16), "UINT16")
