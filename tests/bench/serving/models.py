"""The models that all servers serve, and one request for each with the answer that is right."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bench.serving.environments import PREPARE_S, Environments, run
from numpy.typing import NDArray
from onnx import TensorProto, helper
from simulators.models import save

from hedgerow.proto import oip_pb2

PEERS = Path(__file__).with_name("peers")
FLOAT_BYTES = 4
MB = 1024 * 1024

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Model:
    """A file with one float32 input and one float32 output; `request` has shape (1, …).

    `threads` and `workers` are what each server is told (see `peers.engine.Job`). `gated`: the output holds logits that
    a gate can judge. `tolerance`: how far the answers of a batch may be from those of single requests.
    """

    name: str
    path: Path
    input: str
    output: str
    request: Floats
    threads: int
    workers: int
    gated: bool
    tolerance: float
    expected: Floats = field(init=False)

    def __post_init__(self) -> None:
        session = onnxruntime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
        object.__setattr__(self, "expected", session.run([self.output], {self.input: self.request})[0])

    def message(self) -> bytes:
        """The request in the protocol."""
        given = oip_pb2.ModelInferRequest.InferInputTensor(name=self.input, datatype="FP32", shape=self.request.shape)
        return oip_pb2.ModelInferRequest(
            model_name=self.name, inputs=[given], raw_input_contents=[self.request.tobytes()]
        ).SerializeToString()

    def wrong(self, answer: NDArray[Any]) -> str:
        """What is wrong with `answer`; empty: nothing."""
        if answer.size != self.expected.size:
            return f"the answer has {answer.size} elements, not {self.expected.size}"
        off = float(np.abs(answer.reshape(-1) - self.expected.reshape(-1)).max())
        return "" if off <= self.tolerance else f"the answer is off by {off:g}"


def tiny(folder: Path, _: Environments) -> Model:
    """64 → 64 → 10 with a ReLU: microseconds of work, so what is measured is the server."""
    random = np.random.default_rng(0)
    path = save(
        folder / "tiny.onnx",
        [
            helper.make_node("MatMul", ["input", "w1"], ["z"]),
            helper.make_node("Relu", ["z"], ["h"]),
            helper.make_node("MatMul", ["h", "w2"], ["logits"]),
        ],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        w1=random.normal(size=(64, 64)).astype(np.float32),
        w2=random.normal(size=(64, 10)).astype(np.float32),
    )
    request = random.normal(size=(1, 64)).astype(np.float32)
    return Model("tiny", path, "input", "logits", request, threads=1, workers=1, gated=True, tolerance=1e-3)


def identity(size_bytes: int, folder: Path, _: Environments) -> Model:
    """What comes in goes out."""
    elements = size_bytes // FLOAT_BYTES
    name = f"identity-{size_bytes // MB}mb"
    path = save(
        folder / f"{name}.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", elements])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", elements])],
    )
    request = np.random.default_rng(0).random((1, elements), np.float32)
    return Model(name, path, "x", "y", request, threads=1, workers=1, gated=False, tolerance=0.0)


def efficientnet(cores: int, end: str, folder: Path, environments: Environments) -> Model:
    """EfficientNet-Lite0 with its published weights; a worker a core, an engine thread a worker."""
    path = folder / f"efficientnet-lite0{end}.onnx"
    if not (path.exists() and (folder / "picture.npy").exists()):
        python = environments.python("models")
        run([str(python), str(PEERS / "make_efficientnet.py"), str(folder)], PREPARE_S, "making EfficientNet")
    request = np.load(folder / "picture.npy")
    # Quantized, a batch may round otherwise than a single request.
    tolerance = 0.5 if end else 1e-2
    return Model(path.stem, path, "images", "logits", request, 1, cores, gated=True, tolerance=tolerance)


def makers(cores: int) -> Mapping[str, Callable[[Path, Environments], Model]]:
    """How each model is made, by the name that `--models` takes."""
    return {
        "tiny": tiny,
        "efficientnet-lite0": partial(efficientnet, cores, ""),
        "efficientnet-lite0-int8": partial(efficientnet, cores, "-int8"),
        "identity-1mb": partial(identity, MB),
        "identity-10mb": partial(identity, 10 * MB),
    }
