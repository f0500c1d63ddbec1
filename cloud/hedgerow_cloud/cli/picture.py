"""From a file (.npy or .png) to the array that a model takes, and what had to be done to it, in words."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import InvalidInput, MissingExtra
from hedgerow.tensors import TensorSpec, numpy_dtype

MAX_FILE_BYTES = 256 * 2**20


def read(file: Path, spec: TensorSpec, *, invert: bool = False) -> tuple[NDArray[Any], str]:
    """The array for the input `spec` in `file`, and what was done; raises `InvalidInput` or `MissingExtra`.

    `invert` swaps light and dark of a picture.
    """
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInput(f"{file} is over {MAX_FILE_BYTES >> 20} MiB")
        match file.suffix.lower():
            case ".npy":
                return _array(file, spec)
            case ".png":
                return _picture(file, spec, invert=invert)
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror or error}") from error
    raise InvalidInput(f"{file} is neither .npy nor .png")


def _array(file: Path, spec: TensorSpec) -> tuple[NDArray[Any], str]:
    try:
        array: NDArray[Any] = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InvalidInput(f"{file} is no .npy file of plain numbers: {error}") from error
    done = []
    wanted = numpy_dtype(spec.datatype)
    if array.dtype != wanted and np.can_cast(array.dtype, wanted, "same_kind"):
        done.append(f"cast from {array.dtype} to {wanted}")
        array = array.astype(wanted)
    if len(spec.shape) == array.ndim + 1 and spec.shape[0] in {-1, 1}:
        done.append("made a batch of one")
        array = array[np.newaxis]
    return array, ", ".join(done)


def _picture(file: Path, spec: TensorSpec, *, invert: bool) -> tuple[NDArray[Any], str]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra("pictures need the pillow package; pip install 'hedgerow[cli]' brings it") from error
    height, width, mode, shape = _layout(spec)
    try:
        with Image.open(file, formats=["PNG"]) as image:
            before = f"{image.width}x{image.height} {image.mode}"
            scaled = image.convert(mode).resize((width, height), Image.Resampling.BOX)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise InvalidInput(f"{file} is no picture that can be used: {error}") from error
    pixels = np.asarray(scaled, dtype=np.float32) / 255
    if invert:
        pixels = 1 - pixels
    if mode == "RGB" and shape[-1] != 3:
        pixels = pixels.transpose(2, 0, 1)
    colours = "greyscale" if mode == "L" else "RGB"
    scale = "dark is 1" if invert else "light is 1 (with --invert, dark)"
    done = f"{before} resized to {width}x{height} {colours}, {scale}"
    return pixels.reshape(shape).astype(numpy_dtype(spec.datatype)), done


def _layout(spec: TensorSpec) -> tuple[int, int, str, tuple[int, ...]]:
    """Height, width, PIL's mode and the full shape of a picture for `spec`."""
    if spec.datatype not in {"FP32", "FP64", "FP16"}:
        raise InvalidInput(f"input {spec.name} takes {spec.datatype}; pictures fit inputs of floats. Give an .npy file")
    batched = spec.shape[0] == -1 or len(spec.shape) == 4 if spec.shape else False
    dims = spec.shape[1:] if batched else spec.shape
    shape = (1, *dims) if batched else dims
    match dims:
        case (side,) if side > 0 and math.isqrt(side) ** 2 == side:
            return math.isqrt(side), math.isqrt(side), "L", shape
        case (height, width) if min(dims) > 0:
            return height, width, "L", shape
        case (1, height, width) | (height, width, 1) if min(dims) > 0:
            return height, width, "L", shape
        case (3, height, width) | (height, width, 3) if min(dims) > 0:
            return height, width, "RGB", shape
    raise InvalidInput(f"input {spec.name} has shape {list(spec.shape)}, which is no picture's. Give an .npy file")
