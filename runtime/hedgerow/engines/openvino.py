"""OpenVINO, on the CPU."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import EngineFault, InvalidInput
from hedgerow.tensors import TensorSpec

PACKAGE = "openvino"
EXTRA = "openvino"
PLATFORM = "openvino"

DATATYPES = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
}
"""Left out: text and bfloat16, which its Python tensors do not hand over intact, and UINT64 and FP64, which it computes
in half the bits without a word."""
INT32 = np.iinfo(np.int32)


class OpenVinoSession:
    """An ONNX or OpenVINO IR file, compiled for the CPU."""

    def __init__(self, path: Path, streams: int, threads: int) -> None:
        import openvino as ov

        core = ov.Core()
        options: dict[str, Any] = {
            "NUM_STREAMS": streams,
            # With a single thread it swallows the errors of its operators (2026.4) and answers with what was there.
            "INFERENCE_NUM_THREADS": max(2, streams * threads),
            # Left alone it computes in bfloat16 where the CPU can, and what was certified is not what runs.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            self._compiled: Any = core.compile_model(core.read_model(path), "CPU", options)
        except RuntimeError as error:
            raise EngineFault(f"openvino cannot load {path.name}: {type(error).__name__}") from error
        self.inputs = tuple(_spec(port) for port in self._compiled.inputs)
        self.outputs = tuple(_spec(port) for port in self._compiled.outputs)
        self._local = threading.local()

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `hedgerow.engines.Session`."""
        for name, array in inputs.items():
            if array.dtype == np.int64 and array.size and (array.min() < INT32.min or array.max() > INT32.max):
                raise InvalidInput(f"input {name!r}: openvino computes INT64 in 32 bits, and a value does not fit")
        try:
            # An infer request serves one caller at a time.
            request = getattr(self._local, "request", None)
            if request is None:
                request = self._local.request = self._compiled.create_infer_request()
            request.infer(dict(inputs))
            return {name: np.array(request.get_tensor(name).data) for name in outputs}
        except RuntimeError as error:
            raise EngineFault(f"openvino failed to run the model: {type(error).__name__}") from error

    def close(self) -> None:
        """See `hedgerow.engines.Session`."""
        self._local = threading.local()
        self._compiled = None


def open_model(path: Path, *, streams: int, threads: int) -> OpenVinoSession:
    """See `hedgerow.engines.Engine`."""
    return OpenVinoSession(path, streams, threads)


def _spec(port: Any) -> TensorSpec:
    name, kind, shape = _name(port), port.element_type.to_string(), port.partial_shape
    if kind not in DATATYPES:
        raise EngineFault(f"the model's {name!r} is of type {kind}, which openvino cannot serve here")
    if shape.rank.is_dynamic:
        raise EngineFault(f"the model's {name!r} has no fixed number of dimensions, which openvino cannot serve here")
    return TensorSpec(name, DATATYPES[kind], tuple(size.get_length() if size.is_static else -1 for size in shape))


def _name(port: Any) -> str:
    """The name in the file: a port may have gained others when nodes around it were folded away."""
    name = port.get_node().get_friendly_name().removesuffix("/sink_port_0")
    return str(name if name in port.get_names() else port.any_name)
