"""Small real ONNX models, written to files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hedgerow.tensors import InferRequest, Parameter, Tensor, tensor

FEATURES = 64
CLASSES = 10
OPSET = 17
IR_VERSION = 8


def save(
    path: Path, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], **weights: NDArray[Any]
) -> Path:
    """Write a model of `nodes` to `path`."""
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), path.stem, list(inputs), list(outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def classifier(path: Path, *, sure: float = 1.0, shift: int = 0, extra: bool = False) -> Path:
    """A classifier of `pixels` (n, 64) into `logits` (n, 10): class k answers to feature k, moved on by `shift`.

    `sure` scales the logits. With `extra` it has a second output, `label`.
    """
    weights = np.zeros((FEATURES, CLASSES), np.float32)
    for k in range(CLASSES):
        weights[k, (k + shift) % CLASSES] = sure
    nodes = [helper.make_node("MatMul", ["pixels", "w"], ["logits"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])]
    if extra:
        nodes.append(helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0))
        outputs.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]))
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", FEATURES])
    return save(path, nodes, [pixels], outputs, w=weights)


def heavy(path: Path, *, weights_bytes: int, shift: int = 0) -> Path:
    """A `classifier` whose file has about `weights_bytes`: weights that are computed with, change no answer and cannot
    be compressed."""
    columns = weights_bytes // (4 * FEATURES)
    w = np.zeros((FEATURES, CLASSES), np.float32)
    w[np.arange(CLASSES), (np.arange(CLASSES) + shift) % CLASSES] = 1.0
    nodes = [
        helper.make_node("MatMul", ["pixels", "w"], ["z"]),
        helper.make_node("MatMul", ["pixels", "ballast"], ["b"]),
        helper.make_node("ReduceMax", ["b"], ["s"], axes=[1]),
        helper.make_node("Mul", ["s", "zero"], ["s0"]),
        helper.make_node("Add", ["z", "s0"], ["logits"]),
    ]
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])],
        w=w,
        ballast=np.random.default_rng(shift).random((FEATURES, columns), np.float32),
        zero=np.array(0, np.float32),
    )


def square_root(path: Path) -> Path:
    """`logits` = sqrt(`pixels`[:, :10]): a negative pixel gives NaN."""
    weights = np.eye(FEATURES, CLASSES, dtype=np.float32)
    nodes = [helper.make_node("MatMul", ["pixels", "w"], ["z"]), helper.make_node("Sqrt", ["z"], ["logits"])]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", FEATURES])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])
    return save(path, nodes, [pixels], [logits], w=weights)


def slow(path: Path, *, steps: int) -> Path:
    """A classifier that first multiplies a matrix of 256 rows by itself `steps` times: about 1 ms for each."""
    trip = numpy_helper.from_array(np.array(steps, np.int64), "trip")
    body = helper.make_graph(
        [helper.make_node("MatMul", ["m_in", "unit"], ["m_out"]), helper.make_node("Identity", ["go_in"], ["go_out"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m_in", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m_out", TensorProto.FLOAT, [256, 256]),
        ],
    )
    nodes = [
        helper.make_node("MatMul", ["pixels", "w"], ["z"]),
        # The matrix depends on the input, or it would be computed when the model is loaded.
        helper.make_node("ReduceSum", ["z"], ["s"], keepdims=0),
        helper.make_node("Mul", ["s", "zero"], ["s0"]),
        helper.make_node("Add", ["unit", "s0"], ["m0"]),
        helper.make_node("Loop", ["trip", "", "m0"], ["m"], body=body),
        helper.make_node("ReduceSum", ["m"], ["sm"], keepdims=0),
        helper.make_node("Mul", ["sm", "zero"], ["sm0"]),
        helper.make_node("Add", ["z", "sm0"], ["logits"]),
    ]
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])],
        w=np.eye(FEATURES, CLASSES, dtype=np.float32),
        unit=np.eye(256, dtype=np.float32),
        zero=np.array(0, np.float32),
        trip=numpy_helper.to_array(trip),
    )


def swapped(path: Path, datatype: int) -> Path:
    """`y` = the two columns of `x` swapped, of shape (n, 2) and an ONNX datatype."""
    return save(
        path,
        [helper.make_node("Gather", ["x", "order"], ["y"], axis=1)],
        [helper.make_tensor_value_info("x", datatype, ["n", 2])],
        [helper.make_tensor_value_info("y", datatype, ["n", 2])],
        order=np.array([1, 0], np.int64),
    )


def pixels(*classes: int, strength: float = 1.0) -> NDArray[np.float32]:
    """Rows that the classifiers take for `classes`; `strength` times `sure` is the winning logit."""
    rows = np.zeros((len(classes), FEATURES), np.float32)
    rows[np.arange(len(classes)), list(classes)] = strength
    return rows


def request(array: NDArray[Any] | None = None, *, model: str = "digits", **parameters: Parameter) -> InferRequest:
    """A request for `array`, by default one clear 3."""
    value: Tensor = tensor("pixels", pixels(3) if array is None else array)
    return InferRequest(model=model, inputs=(value,), parameters=parameters)
