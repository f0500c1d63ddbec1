"""ONNX Runtime, on the CPU."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import EngineFault, InvalidInput
from hedgerow.tensors import TensorSpec

PACKAGE = "onnxruntime"
EXTRA = "edge"
PLATFORM = "onnxruntime_onnx"

DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
ONNX_BFLOAT16 = 16
"""TensorProto.BFLOAT16."""


class OnnxRuntimeSession:
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin between calls take the core that answers the next request.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session: Any = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            raise EngineFault(f"onnxruntime cannot load {path.name}: {type(error).__name__}") from error
        self._ort = ort
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self._datatypes = {spec.name: spec.datatype for spec in (*self.inputs, *self.outputs)}
        self._has_bfloat16 = "BF16" in self._datatypes.values()

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `hedgerow.engines.Session`."""
        feed = {
            name: _decoded(name, array) if self._datatypes[name] == "BYTES" else array for name, array in inputs.items()
        }
        run = self._run_values if self._has_bfloat16 else self._session.run
        try:
            arrays = run(list(outputs), feed)
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            raise EngineFault(f"onnxruntime failed to run the model: {type(error).__name__}") from error
        return {
            name: _encoded(array) if self._datatypes[name] == "BYTES" else array
            for name, array in zip(outputs, arrays, strict=True)
        }

    def close(self) -> None:
        """See `hedgerow.engines.Session`."""
        self._session = None

    def _run_values(self, outputs: list[str], feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """As `InferenceSession.run`, for models with bfloat16, which numpy cannot carry: their bits go as uint16."""
        value = self._ort.OrtValue
        values = {
            name: value.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), ONNX_BFLOAT16)
            if self._datatypes[name] == "BF16"
            else value.ortvalue_from_numpy(array)
            for name, array in feed.items()
        }
        return [
            _bits(result) if self._datatypes[name] == "BF16" else result.numpy()
            for name, result in zip(outputs, self._session.run_with_ort_values(outputs, values), strict=True)
        ]


def open_model(path: Path, *, streams: int, threads: int) -> OnnxRuntimeSession:  # noqa: ARG001 (any number may call)
    """See `hedgerow.engines.Engine`."""
    return OnnxRuntimeSession(path, threads)


def _spec(value: Any) -> TensorSpec:
    if value.type not in DATATYPES:
        raise EngineFault(f"the model's {value.name!r} is a {value.type}, which cannot be served")
    # A dimension without a fixed size is None or the name of a symbol.
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in value.shape)
    return TensorSpec(value.name, DATATYPES[value.type], shape)


def _decoded(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """ONNX strings are UTF-8 text; given bytes, onnxruntime would take their repr."""
    try:
        texts = [item.decode() for item in array.flat]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"input {name!r}: its BYTES must be UTF-8") from error
    return _objects(texts, array.shape)


def _encoded(array: NDArray[Any]) -> NDArray[Any]:
    return _objects([str(item).encode() for item in array.flat], array.shape)


def _objects(items: Sequence[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def _bits(value: Any) -> NDArray[Any]:
    """A bfloat16 OrtValue's bits: there is no numpy() for it, so they are copied from where they lie."""
    shape = tuple(value.shape())
    buffer = (ctypes.c_uint16 * int(np.prod(shape, dtype=np.int64))).from_address(value.data_ptr())
    bits: NDArray[Any] = np.ctypeslib.as_array(buffer).reshape(shape).copy()
    return bits
