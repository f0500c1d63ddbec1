"""A custom runtime for MLServer; its settings are files beside it (`bench.serving.servers`)."""

# mypy: disable-error-code="import-not-found, misc"

import asyncio
from typing import Any

from engine import Model, read_job
from mlserver import MLModel, types
from mlserver.codecs import NumpyCodec


class Runtime(MLModel):
    async def load(self) -> bool:
        self.job = read_job()
        self.engine = Model(self.job)
        return True

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        array: Any = NumpyCodec.decode_input(payload.inputs[0])
        if self.job.threaded:
            answer = await asyncio.get_running_loop().run_in_executor(self.engine.pool, self.engine, array)
        else:
            answer = self.engine(array)
        output = NumpyCodec.encode_output(self.job.output, answer)
        return types.InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
