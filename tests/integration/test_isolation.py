"""A model in a process of its own answers as in ours: the engines' contract, text, large tensors, many at once."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract import test_engines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from simulators import models

from hedgerow.errors import ConfigError, EngineFault
from hedgerow.isolation import child as isolated
from hedgerow.isolation.child import Lane, Placed
from hedgerow.isolation.session import IsolatedSession, open_isolated

LIMIT_BYTES = 1024 * 1024


class Isolated:
    """ONNX Runtime, each model in a process of its own."""

    PACKAGE = "onnxruntime"
    EXTRA = "edge"
    PLATFORM = "onnxruntime_onnx"

    def __init__(self) -> None:
        self.opened: list[IsolatedSession] = []

    def open_model(self, path: Path, *, streams: int, threads: int) -> IsolatedSession:
        self.opened.append(open_isolated("onnxruntime", path, streams=streams, threads=threads))
        return self.opened[-1]


@pytest.fixture
def engine() -> Iterator[Isolated]:
    engine = Isolated()
    yield engine
    for session in engine.opened:
        session.close()


class TestIsolatedEngine(test_engines.TestEngine):
    """Whatever holds for an engine holds for one in another process."""


def negative(path: Path) -> Path:
    """`y` = -`x`, floats of any number."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    return models.save(path, [helper.make_node("Neg", ["x"], ["y"])], ends[:1], ends[1:])


def test_large_and_small_tensors_by_turns_arrive_whole(engine: Isolated, tmp_path: Path) -> None:
    session = engine.open_model(negative(tmp_path / "m.onnx"), streams=2, threads=1)
    random = np.random.default_rng(1)
    # Beyond what a lane keeps, so that its memory is given back, found again empty, and filled anew.
    for size in (1, 0, 3, isolated.KEPT_BYTES // 4, 10, 0, isolated.KEPT_BYTES // 2, 1, isolated.KEPT_BYTES // 2):
        x = random.random(size, np.float32)
        np.testing.assert_array_equal(session.run({"x": x}, ["y"])["y"], -x)
    strided = random.random((1000, 2), np.float32)[:, 1]
    np.testing.assert_array_equal(session.run({"x": strided}, ["y"])["y"], -strided)


def test_threads_with_tensors_of_many_sizes_get_their_own_answers(engine: Isolated, tmp_path: Path) -> None:
    session = engine.open_model(negative(tmp_path / "m.onnx"), streams=2, threads=1)
    start = threading.Barrier(6)

    def caller(k: int) -> bool:
        start.wait()
        sizes = np.random.default_rng(k).integers(0, 60_000, 30)
        answers = (session.run({"x": np.full(n, k, np.float32)}, ["y"])["y"] for n in sizes)
        return all((answer == -k).all() and answer.size == n for answer, n in zip(answers, sizes, strict=True))

    with ThreadPoolExecutor(6) as pool:  # more than there are lanes
        assert all(pool.map(caller, range(6)))


def test_an_engine_that_there_is_not_is_the_same_error_as_ever(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no engine 'onnxrt'"):
        open_isolated("onnxrt", models.classifier(tmp_path / "m.onnx"), streams=1, threads=1)


def test_a_command_that_cannot_be_started_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(EngineFault, match="cannot be started"):
        open_isolated("onnxruntime", tmp_path / "m", streams=1, threads=1, command=(str(tmp_path / "none"),))


# -- lanes


@pytest.fixture(scope="module")
def lane() -> Iterator[Lane]:
    lane, far, _ = Lane.create(LIMIT_BYTES)
    with far:
        yield lane
    lane.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.binary(max_size=300).map(lambda raw: np.frombuffer(raw, np.uint8))
        | st.lists(st.binary(max_size=300), max_size=9).map(lambda texts: np.array([*texts, None], object)[:-1]),
        max_size=5,
    )
)
def test_what_is_put_into_a_lane_is_got_out_of_it(lane: Lane, arrays: dict[str, NDArray[Any]]) -> None:
    datatypes = {name: "BYTES" if array.dtype == object else "UINT8" for name, array in arrays.items()}
    placed, end = lane.put(arrays, datatypes, 64)
    got = lane.get(placed, datatypes)
    assert list(got) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype
        assert not got[name].flags.writeable
    assert all(place.at % isolated.ALIGNMENT == 0 and place.at + place.size <= end for place in placed)


@pytest.mark.parametrize(
    "place",
    [
        Placed("f", (4,), LIMIT_BYTES, 16),
        Placed("f", (2**40,), 0, 16),
        Placed("f", (2**62, 4), 0, 16),
        Placed("f", (-1,), 0, 4),
        Placed("f", (4,), -8, 16),
        Placed("f", (1,), 2**70, 4),
        Placed("f", (4,), 0, 8),
        Placed("nobody", (4,), 0, 16),
        Placed("t", (4,), -16, 16),
        Placed("t", (4,), 0, -16),
        Placed("t", (4,), 0, 2**40),
    ],
)
def test_what_a_process_gone_wild_says_of_a_lane_is_not_believed(lane: Lane, place: Placed) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, OverflowError)):
        lane.get([place], {"f": "FP32", "t": "BYTES"})


def test_the_other_end_cannot_take_memory_away() -> None:
    lane, far, memory = Lane.create(LIMIT_BYTES)
    with far, pytest.raises(PermissionError):
        os.ftruncate(memory, 0)
    lane.close()


def test_what_a_large_run_took_goes_back_once_it_is_not_needed_any_more() -> None:
    lane, far, memory = Lane.create(8 * isolated.KEPT_BYTES)
    with far:
        for size, most in ((2 * isolated.KEPT_BYTES, 3 * isolated.KEPT_BYTES), (1, isolated.KEPT_BYTES)):
            placed, _ = lane.put({"x": np.ones(size, np.uint8)}, {"x": "UINT8"})
            assert lane.get(placed, {"x": "UINT8"})["x"].all()
            lane.tidy(placed)
            assert size <= os.fstat(memory).st_blocks * 512 <= most
    lane.close()
