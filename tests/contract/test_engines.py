"""What every engine has to conform to. A new file in ``engines/`` is under this contract the moment it exists."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from simulators import models

from hedgerow import engines
from hedgerow.engines import Engine
from hedgerow.errors import ConfigError, EngineFault, InvalidInput, MissingExtra
from hedgerow.tensors import TensorSpec

SAMPLES: dict[str, NDArray[Any]] = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 65535]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**40]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-32768, 32767]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**31), 2**31 - 1]], np.int64),
    "FP16": np.array([[-1.5, 6e4]], np.float16),
    "BF16": np.array([[0x3FC0, 0xC000]], np.uint16),
    "FP32": np.array([[-1.5, 3e38]], np.float32),
    "FP64": np.array([[-1.5, 1 / 3]], np.float64),
    "BYTES": np.array([["Grüße\0".encode(), b""]], object),
}
MAY_BE_REFUSED = {"BF16", "BYTES", "FP64", "UINT64"}
"""What an engine may be unable to carry."""
ONNX = {
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "BOOL": TensorProto.BOOL,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


@pytest.fixture(params=engines.known())
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param not in engines.available():
        pytest.skip(f"{request.param} is not installed")
    return engines.load(request.param)


class TestEngine:
    def test_tells_the_interface_of_the_file(self, engine: Engine, tmp_path: Path) -> None:
        session = engine.open_model(models.classifier(tmp_path / "m.onnx", extra=True), streams=2, threads=1)
        assert session.inputs == (TensorSpec("pixels", "FP32", (-1, 64)),)
        assert session.outputs == (TensorSpec("logits", "FP32", (-1, 10)), TensorSpec("label", "INT64", (-1,)))

    def test_computes_what_the_file_says_for_any_batch(self, engine: Engine, tmp_path: Path) -> None:
        session = engine.open_model(models.classifier(tmp_path / "m.onnx", sure=2.5, extra=True), streams=2, threads=1)
        for batch in ([3], [1, 2, 9], list(range(10)) * 7):
            outputs = session.run({"pixels": models.pixels(*batch)}, ["logits", "label"])
            np.testing.assert_array_equal(outputs["label"], batch)
            np.testing.assert_allclose(outputs["logits"], 2.5 * np.eye(10)[batch])

    def test_gives_only_the_outputs_asked_for(self, engine: Engine, tmp_path: Path) -> None:
        session = engine.open_model(models.classifier(tmp_path / "m.onnx", extra=True), streams=2, threads=1)
        assert list(session.run({"pixels": models.pixels(1)}, ["label"])) == ["label"]

    def test_answers_stay_as_they_were_when_more_follow(self, engine: Engine, tmp_path: Path) -> None:
        session = engine.open_model(models.classifier(tmp_path / "m.onnx"), streams=2, threads=1)
        first = session.run({"pixels": models.pixels(1)}, ["logits"])["logits"]
        session.run({"pixels": models.pixels(2)}, ["logits"])
        assert first.argmax() == 1

    @pytest.mark.parametrize("datatype", SAMPLES)
    def test_carries_every_datatype_intact_or_refuses_the_file(
        self, engine: Engine, datatype: str, tmp_path: Path
    ) -> None:
        path = models.swapped(tmp_path / "m.onnx", ONNX[datatype])
        try:
            session = engine.open_model(path, streams=2, threads=1)
        except EngineFault as fault:
            assert datatype in MAY_BE_REFUSED, fault  # noqa: PT017 (one of two right outcomes)
            return
        assert session.inputs == (TensorSpec("x", datatype, (-1, 2)),)
        given = SAMPLES[datatype]
        given.flags.writeable = False  # as inputs that are views on received bytes
        answer = session.run({"x": given}, ["y"])["y"]
        assert answer.dtype == given.dtype
        np.testing.assert_array_equal(answer, given[:, ::-1])

    def test_an_integer_too_large_for_the_engine_is_refused_rather_than_bent(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        session = engine.open_model(models.swapped(tmp_path / "m.onnx", TensorProto.INT64), streams=2, threads=1)
        given = np.array([[-(2**40), 2**40]], np.int64)
        try:
            answer = session.run({"x": given}, ["y"])["y"]
        except InvalidInput as error:
            assert "'x'" in str(error)  # noqa: PT017 (one of two right outcomes)
        else:
            np.testing.assert_array_equal(answer, given[:, ::-1])

    def test_may_be_run_from_several_threads_at_once(self, engine: Engine, tmp_path: Path) -> None:
        session = engine.open_model(models.classifier(tmp_path / "m.onnx"), streams=2, threads=1)
        start = threading.Barrier(4)

        def hammer(k: int) -> bool:
            start.wait()
            runs = [session.run({"pixels": models.pixels(k)}, ["logits"])["logits"] for _ in range(100)]
            return all(logits.argmax() == k for logits in runs)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(hammer, range(4)))

    def test_a_file_that_is_no_model_is_a_fault_without_its_path(self, engine: Engine, tmp_path: Path) -> None:
        bad = tmp_path / "bad.onnx"
        bad.write_bytes(b"\x08\xff" * 100)
        with pytest.raises(EngineFault, match=r"bad\.onnx") as caught:
            engine.open_model(bad, streams=2, threads=1)
        assert str(tmp_path) not in str(caught.value)

    def test_a_crash_while_running_is_a_fault_without_paths(self, engine: Engine, tmp_path: Path) -> None:
        path = models.save(
            tmp_path / "m.onnx",
            [helper.make_node("Add", ["x", "v"], ["y"])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in "xv"],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])],
        )
        session = engine.open_model(path, streams=2, threads=1)
        with pytest.raises(EngineFault) as caught:
            session.run({"x": np.zeros((3, 5), np.float32), "v": np.zeros((3, 4), np.float32)}, ["y"])
        assert "/" not in str(caught.value)
        assert caught.value.__cause__ is not None  # for the log
        good = np.ones((3, 4), np.float32)
        assert session.run({"x": good, "v": good}, ["y"])["y"].sum() == 24  # and it lives on

    def test_closing_twice_is_once(self, engine: Engine, tmp_path: Path) -> None:
        session = engine.open_model(models.classifier(tmp_path / "m.onnx"), streams=2, threads=1)
        session.close()
        session.close()


def test_text_that_is_not_utf8_is_the_callers_mistake(tmp_path: Path) -> None:
    session = engines.load("onnxruntime").open_model(
        models.swapped(tmp_path / "m.onnx", TensorProto.STRING), streams=2, threads=1
    )
    with pytest.raises(InvalidInput, match="'x'"):
        session.run({"x": np.array([[b"\xff", b""]], object)}, ["y"])


def test_an_unknown_engine_is_a_wrong_setting_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="onnxruntime"):
        engines.load("onnxrt")


def test_an_engine_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hedgerow.engines.openvino.PACKAGE", "no_such_package_at_all")
    assert "openvino" not in engines.available()
    with pytest.raises(MissingExtra, match=r"hedgerow\[openvino\]"):
        engines.load("openvino")
