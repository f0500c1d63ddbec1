"""The calibration model for MLServer: runs in MLServer's own environment, and gives back what it is given."""

from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput  # type: ignore[import-not-found]


class Mixed(MLModel):  # type: ignore[misc]
    """An identity, written as MLServer's documentation has it."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = {one.name: one for one in payload.inputs}
        outputs = [
            ResponseOutput(
                name=one.name, shape=one.shape, datatype=one.datatype, data=one.data, parameters=one.parameters
            )
            for asked in payload.outputs or payload.inputs
            if (one := given.get(asked.name))
        ]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
