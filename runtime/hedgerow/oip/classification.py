"""OIP's classification extension: outputs as their largest values, with the names of the classes, in words."""

import math
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from hedgerow.errors import InvalidInput
from hedgerow.proto import oip_pb2
from hedgerow.tensors import InferResponse, ModelMetadata, Tensor, objects

CLASSIFICATION = "classification"
"""Parameter of a requested output: how many classes of it are wanted, in words."""


def classified(response: InferResponse, message: oip_pb2.ModelInferRequest, metadata: ModelMetadata) -> InferResponse:
    """`response` with the outputs that `message` wants as classes in that form (OIP's classification extension).

    Each is BYTES then: the largest values, the largest first, as "value:index" or, where the model's `labels` are
    known, "value:index:label". Raises `InvalidInput` for an output of text.
    """
    wanted = {
        asked.name: asked.parameters[CLASSIFICATION].int64_param
        for asked in message.outputs
        if CLASSIFICATION in asked.parameters
    }
    if not wanted:
        return response
    labels = metadata.properties["labels"].split(",") if metadata.properties.get("labels") else []
    batched = {spec.name for spec in metadata.outputs if spec.shape[:1] == (-1,)}
    return replace(
        response,
        outputs=tuple(
            _classes(t, wanted[t.name], labels, batched=t.name in batched) if t.name in wanted else t
            for t in response.outputs
        ),
    )


def _classes(tensor: Tensor, count: int, labels: Sequence[str], *, batched: bool) -> Tensor:
    if tensor.datatype == "BYTES":
        raise InvalidInput(f"output {tensor.name!r}: {CLASSIFICATION} needs numbers, and it is text")
    array = tensor.array
    if tensor.datatype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    rows = array.reshape((len(array), math.prod(array.shape[1:])) if batched else (1, array.size))
    # Ascending over the reversed row, read backwards: of equal values the first comes first.
    order = rows.shape[1] - 1 - np.argsort(rows[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :count]
    texts = [
        f"{f'{row[index]:f}' if row.dtype.kind == 'f' else int(row[index])}:{index}"
        + (f":{labels[index]}" if index < len(labels) else "")
        for row, indices in zip(rows, order, strict=True)
        for index in indices.tolist()
    ]
    shape = order.shape if batched else order.shape[1:]
    return Tensor(tensor.name, "BYTES", objects([text.encode() for text in texts], shape))
