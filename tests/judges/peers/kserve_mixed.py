"""The calibration model for KServe: runs in KServe's own environment, and gives back what it is given."""

from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer  # type: ignore[import-not-found]

TENSORS = [
    {"name": "numbers", "datatype": "FP32", "shape": [-1, 4]},
    {"name": "text", "datatype": "BYTES", "shape": [-1, 2]},
]


class Mixed(Model):  # type: ignore[misc]
    """An identity, written as KServe's documentation has it."""

    def __init__(self) -> None:
        super().__init__("mixed")
        self.ready = True

    def get_input_types(self) -> list[dict[str, Any]]:
        return TENSORS

    def get_output_types(self) -> list[dict[str, Any]]:
        return TENSORS

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        given = {one.name: one for one in payload.inputs}
        outputs = []
        for asked in payload.request_outputs or payload.inputs:
            if one := given.get(asked.name):
                output = InferOutput(one.name, list(one.shape), one.datatype)
                output.set_data_from_numpy(one.as_numpy())
                outputs.append(output)
        return InferResponse(payload.id, self.name, outputs)


if __name__ == "__main__":
    ModelServer().start([Mixed()])
