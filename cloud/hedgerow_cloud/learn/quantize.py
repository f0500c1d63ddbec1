"""Static quantization to int8: QDQ nodes, one scale a channel, ranges measured on training images."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import HedgerowError
from hedgerow_cloud.learn.data import Images
from hedgerow_cloud.learn.train import INPUT

PRECISION: Final = "int8"
MIN_AGREEMENT: Final = 0.95
"""Share of answers that quantization must not change; less means that it went wrong."""


def quantize(float_model: Path, into: Path, images: Images, *, reduce_range: bool = True) -> None:
    """Write the int8 form of `float_model` to `into`, activation ranges taken from its answers to `images`.

    `reduce_range` keeps weights to 7 bits. Without it, CPUs that lack VNNI (AVX2 and older) saturate in 16-bit sums and
    change answers; a file for any CPU needs it, one for a profile with VNNI or dot-product instructions does not.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(str(float_model), str(prepared))
        quantize_static(
            str(prepared),
            str(into),
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
        )


def agreement(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Share of rows of two arrays of logits with the same most likely class."""
    return float((one.argmax(axis=1) == other.argmax(axis=1)).mean())


def check(float_logits: NDArray[Any], int8_logits: NDArray[Any]) -> float:
    """The agreement of both; raises `HedgerowError` if it is below `MIN_AGREEMENT`."""
    share = agreement(float_logits, int8_logits)
    if share < MIN_AGREEMENT:
        raise HedgerowError(
            f"quantization changed {1 - share:.1%} of the answers; at most {1 - MIN_AGREEMENT:.1%} may be"
        )
    return share


def output_step(model: Path, output: str) -> float:
    """The size of one quantization step of `output`: two correct engines may differ by a few of them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(model)).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and output in node.output:
            return float(np.max(numpy_helper.to_array(initializers[node.input[1]])))
    raise HedgerowError(f"the output {output!r} of {model.name} is not quantized")


def parameters(model: Path) -> int:
    """How many numbers the model at `model` holds."""
    import onnx

    return sum(math.prod(tensor.dims) for tensor in onnx.load(str(model)).graph.initializer)


class _Reader:
    """Images in one batch, as onnxruntime's CalibrationDataReader wants them."""

    def __init__(self, images: Images) -> None:
        self._batches: Iterator[dict[str, Images]] = iter([{INPUT: images}])

    def get_next(self) -> dict[str, Images] | None:
        return next(self._batches, None)

    def __len__(self) -> int:
        return 1
